"""OLMo 2 (arXiv:2501.00656): norms of what is added instead of what is read, and of all queries and all keys."""

from treadle.families.family import Family
from treadle.families.llama import ATTENTION, BIAS, EMBEDDINGS, FEED_FORWARD, GATED, HEAD_DIM, LAYER, MODEL, SIZES, eps
from treadle.families.rope import Rope

MIXER = {"kind": "attention", "position": {"kind": "rope"}, "qk_norm": {"kind": "rms"}, "qk_norm_over": "all"}

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    model=MODEL,
    layer={**LAYER, "kind": "reordered_norm", "mixer": MIXER},
    rules=(*SIZES, HEAD_DIM, eps(1e-5), *FEED_FORWARD, BIAS, Rope()),
    tensors={
        **EMBEDDINGS,
        **ATTENTION,
        **GATED,
        "layers.*.mixer_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.feedforward_norm": "model.layers.*.post_feedforward_layernorm",
    },
)
