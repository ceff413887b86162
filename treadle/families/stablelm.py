"""StableLM 2 and 3B (arXiv:2402.17834): layer norms, a quarter of each head rotated; 12B has parallel layers and norms
of queries and keys, whose weights differ by head."""

from treadle.families.family import Family
from treadle.families.layouts import Rows
from treadle.families.llama import FEED_FORWARD, LAYER, TENSORS, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Key

NORM = {"kind": "layer"}
QK_NORM = {"kind": "layer", "bias": False}

FAMILY = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    model={"norm": NORM},
    layer={**LAYER, "norm": NORM},
    rules=(
        *sizes(kv_heads=32),
        *FEED_FORWARD,
        Key(
            "use_parallel_residual",
            "layers.*.kind",
            default=False,
            to=lambda parallel: "parallel" if parallel else "pre_norm",
            back=lambda kind: kind == "parallel",
        ),
        Key("use_qkv_bias", "layers.*.mixer.bias", default=False),
        Key(
            "qk_layernorm",
            "layers.*.mixer.qk_norm_over",
            default=False,
            to=lambda normed: "own" if normed else "head",
            back=lambda over: over == "own",
        ),
        Key(
            "qk_layernorm",
            "layers.*.mixer.qk_norm",
            default=False,
            to=lambda normed: dict(QK_NORM) if normed else None,
            back=lambda norm: norm is not None,
        ),
        Key("layer_norm_eps", "norm.eps", "layers.*.norm.eps", "layers.*.mixer.qk_norm.eps", default=1e-5),
        Rope(partial=0.25),
    ),
    tensors={
        **TENSORS,
        "layers.*.mixer.q_norm.weight": Rows("model.layers.*.self_attn.q_layernorm.norms.{row}.weight"),
        "layers.*.mixer.k_norm.weight": Rows("model.layers.*.self_attn.k_layernorm.norms.{row}.weight"),
    },
)
