"""GPT-OSS (OpenAI 2025, arXiv:2508.10925)."""

from treadle.families.family import Family
from treadle.families.layouts import InterleavedExperts, Transposed, Whole
from treadle.families.llama import ATTENTION, BIAS, EMBEDDINGS, MODEL, NORMS, SIZES
from treadle.families.rope import Rope
from treadle.families.rules import Fixed, Ignored, Key, Windows

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    model=MODEL,
    layer={
        "kind": "pre_norm",
        "norm": {"kind": "rms"},
        "mixer": {"kind": "attention", "position": {"kind": "rope"}, "sinks": True},
        "feedforward": {
            "kind": "moe",
            "activation": "clamped_silu",
            "bias": True,
            "router": {"kind": "softmax", "bias": True},  # over the chosen, which is over all, then normalised
        },
    },
    rules=(
        *SIZES,
        Key("head_dim", "layers.*.mixer.head_dim", default=64),
        Key("rms_norm_eps", "norm.eps", "layers.*.norm.eps", default=1e-5),
        Key("attention_bias", *BIAS.paths, default=True),
        Windows(lambda config, layer: layer % 2 == 0, window=128),
        Key("num_local_experts", "layers.*.feedforward.experts", also=("num_experts",)),
        Key("num_experts_per_tok", "layers.*.feedforward.top_k", also=("experts_per_token",)),
        Key("intermediate_size", "layers.*.feedforward.dim"),
        Fixed("hidden_act", "silu"),
        Fixed("swiglu_alpha", 1.702),
        Fixed("swiglu_limit", 7.0),
        Rope(theta=150_000.0, default=YARN),
        Ignored("initial_context_length"),  # as in rope_scaling
    ),
    tensors={
        **EMBEDDINGS,
        **ATTENTION,
        **NORMS,
        "layers.*.mixer.sinks": "model.layers.*.self_attn.sinks",
        "layers.*.feedforward.router.gate": "model.layers.*.mlp.router",
        "layers.*.feedforward.gate_up.weight": InterleavedExperts("model.layers.*.mlp.experts.gate_up_proj"),
        "layers.*.feedforward.gate_up.bias": InterleavedExperts("model.layers.*.mlp.experts.gate_up_proj_bias"),
        "layers.*.feedforward.down.weight": Transposed("model.layers.*.mlp.experts.down_proj"),
        "layers.*.feedforward.down.bias": Whole("model.layers.*.mlp.experts.down_proj_bias"),
    },
)
