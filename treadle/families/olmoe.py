"""OLMoE (arXiv:2409.02060): Llama with small experts, and norms of all queries and all keys."""

from treadle.families.family import Family
from treadle.families.llama import ATTENTION, BIAS, EMBEDDINGS, LAYER, MODEL, NORMS, SIZES, eps
from treadle.families.olmo2 import MIXER
from treadle.families.qwen2_moe import EXPERT_TENSORS
from treadle.families.rope import Rope
from treadle.families.rules import Activation, Fixed, Key

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    model=MODEL,
    layer={**LAYER, "mixer": MIXER, "feedforward": {"kind": "moe", "router": {"kind": "softmax"}}},
    rules=(
        *SIZES,
        eps(1e-5),
        Key("num_experts", "layers.*.feedforward[moe].experts", also=("num_local_experts",)),
        Key("num_experts_per_tok", "layers.*.feedforward[moe].top_k"),
        Key("intermediate_size", "layers.*.feedforward[moe].dim"),
        Key("norm_topk_prob", "layers.*.feedforward[moe].router.normalise", default=False),
        Activation("hidden_act", "layers.*.feedforward.activation", default="silu"),
        BIAS,
        Fixed("clip_qkv", None),  # it would come after the norms, ours is before; no published model has it
        Rope(),
    ),
    tensors={**EMBEDDINGS, **ATTENTION, **NORMS, **EXPERT_TENSORS},
)
