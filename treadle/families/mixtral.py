"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from treadle.families.family import Family
from treadle.families.layouts import Plain
from treadle.families.llama import ATTENTION, EMBEDDINGS, HEAD_DIM, LAYER, MODEL, NORMS, eps, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Activation, Key

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    model=MODEL,
    layer={**LAYER, "feedforward": {"kind": "moe", "router": {"kind": "softmax"}}},
    rules=(
        *sizes(kv_heads=8),
        HEAD_DIM,
        eps(1e-5),
        Key("num_local_experts", "layers.*.feedforward[moe].experts", also=("num_experts",)),
        Key("num_experts_per_tok", "layers.*.feedforward[moe].top_k"),
        Key("intermediate_size", "layers.*.feedforward[moe].dim"),
        Activation("hidden_act", "layers.*.feedforward.activation", default="silu"),
        Key("sliding_window", "layers.*.mixer.window", default=None),
        Rope(theta=1e6),
    ),
    tensors={
        **EMBEDDINGS,
        **ATTENTION,
        **NORMS,
        "layers.*.feedforward.router.gate": "model.layers.*.block_sparse_moe.gate",
        "layers.*.feedforward.gate_up": Plain(
            "model.layers.*.block_sparse_moe.experts.{expert}.{part}", gate="w1", up="w3"
        ),
        "layers.*.feedforward.down": "model.layers.*.block_sparse_moe.experts.{expert}.w2",
    },
)
