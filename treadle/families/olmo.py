"""OLMo (arXiv:2402.00838): Llama with norms that have nothing to learn, and clipped queries, keys and values."""

from treadle.families.family import Family
from treadle.families.llama import ATTENTION, BIAS, EMBEDDINGS, FEED_FORWARD, GATED, HEAD_DIM, LAYER, SIZES
from treadle.families.rope import Rope
from treadle.families.rules import Key

NORM = {"kind": "layer", "weight": False, "eps": 1e-5}

FAMILY = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    model={"norm": NORM},
    layer={**LAYER, "norm": NORM},
    rules=(*SIZES, HEAD_DIM, *FEED_FORWARD, BIAS, Key("clip_qkv", "layers.*.mixer.clip", default=None), Rope()),
    tensors={**EMBEDDINGS, **ATTENTION, **GATED},
)
