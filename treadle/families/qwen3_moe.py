"""Qwen 3 MoE (arXiv:2505.09388): Qwen 3 with many small experts and none for all tokens."""

from treadle.families.family import Family
from treadle.families.llama import ATTENTION, BIAS, EMBEDDINGS, EPS, HEAD_DIM, LAYER, MODEL, NORMS, sizes
from treadle.families.qwen2_moe import EXPERT_TENSORS, EXPERTS
from treadle.families.qwen3 import MIXER
from treadle.families.rope import Rope
from treadle.families.rules import Activation, Ignored, Key, Sparse, Windows

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model=MODEL,
    layer={**LAYER, "mixer": MIXER},
    rules=(
        *sizes(kv_heads=4),
        HEAD_DIM,
        EPS,
        Sparse(moe={"kind": "moe", "router": {"kind": "softmax"}}, dense={"kind": "gated"}),
        *EXPERTS,
        Key("intermediate_size", "layers.*.feedforward[gated].dim", default=6144),
        Activation("hidden_act", "layers.*.feedforward.activation", default="silu"),
        BIAS,
        Windows(lambda config, layer: True, window=4096, switch="use_sliding_window", typed=False),
        Ignored("max_window_layers"),  # with windows, all layers have them
        Rope(),
    ),
    tensors={**EMBEDDINGS, **ATTENTION, **NORMS, **EXPERT_TENSORS},
)
