"""Qwen 3 (arXiv:2505.09388): Llama with queries and keys normed in each head."""

from treadle.families.family import Family
from treadle.families.llama import BIAS, EPS, FEED_FORWARD, LAYER, MODEL, TENSORS, sizes
from treadle.families.qwen2 import WINDOWS
from treadle.families.rope import Rope
from treadle.families.rules import Key

MIXER = {"kind": "attention", "position": {"kind": "rope"}, "qk_norm": {"kind": "rms"}}
HEAD_DIM = Key("head_dim", "layers.*.mixer.head_dim", default=128)

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    model=MODEL,
    layer={**LAYER, "mixer": MIXER},
    rules=(*sizes(kv_heads=32), HEAD_DIM, EPS, *FEED_FORWARD, BIAS, WINDOWS, Rope()),
    tensors=TENSORS,
)
