"""Qwen 1.5 and 2 MoE (arXiv:2407.10671): Qwen 2 with many small experts, and a gated one that every token visits."""

from treadle.families.family import Family
from treadle.families.layouts import Layout
from treadle.families.llama import ATTENTION, EMBEDDINGS, EPS, HEAD_DIM, LAYER, MODEL, NORMS, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Activation, Key, Rule, Sparse, Windows

MOE = {"kind": "moe", "router": {"kind": "softmax"}, "shared": {"kind": "gated"}, "shared_gate": True}

EXPERTS: tuple[Rule, ...] = (
    Key("num_experts", "layers.*.feedforward[moe].experts", also=("num_local_experts",)),
    Key("num_experts_per_tok", "layers.*.feedforward[moe].top_k"),
    Key("moe_intermediate_size", "layers.*.feedforward[moe].dim"),
    Key("norm_topk_prob", "layers.*.feedforward[moe].router.normalise", default=False),
)
EXPERT_TENSORS: dict[str, str | Layout] = {
    "layers.*.feedforward.router.gate": "model.layers.*.mlp.gate",
    "layers.*.feedforward.gate_up": "model.layers.*.mlp.{experts}{part}_proj",
    "layers.*.feedforward.down": "model.layers.*.mlp.{experts}down_proj",
}

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(
        *sizes(kv_heads=16),
        HEAD_DIM,
        EPS,
        Sparse(moe=MOE, dense={"kind": "gated"}),
        *EXPERTS,
        Key("shared_expert_intermediate_size", "layers.*.feedforward[moe].shared.dim"),
        Key("intermediate_size", "layers.*.feedforward[gated].dim", default=5632),
        Activation(
            "hidden_act", "layers.*.feedforward.activation", "layers.*.feedforward.shared.activation", default="silu"
        ),
        Key("qkv_bias", "layers.*.mixer.bias", default=True),
        Windows(
            lambda config, layer: layer % 2 == 0 and layer < config.get("max_window_layers", 28),
            window=4096,
            names=("max_window_layers",),
            switch="use_sliding_window",
        ),
        Rope(),
    ),
    tensors={
        **EMBEDDINGS,
        **ATTENTION,
        **NORMS,
        **EXPERT_TENSORS,
        "layers.*.feedforward.shared.gate_up": "model.layers.*.mlp.shared_expert.{part}_proj",
        "layers.*.feedforward.shared.down": "model.layers.*.mlp.shared_expert.down_proj",
        "layers.*.feedforward.shared_gate": "model.layers.*.mlp.shared_expert_gate",
    },
)
