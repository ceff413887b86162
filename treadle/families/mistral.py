"""Mistral (arXiv:2310.06825): Llama, the first of them with a window in every layer."""

from treadle.families.family import Family
from treadle.families.llama import EPS, FEED_FORWARD, HEAD_DIM, LAYER, MODEL, TENSORS, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Key

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(
        *sizes(kv_heads=8),
        HEAD_DIM,
        EPS,
        *FEED_FORWARD,
        Key("sliding_window", "layers.*.mixer.window", default=4096),
        Rope(),
    ),
    tensors=TENSORS,
)
