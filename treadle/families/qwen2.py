"""Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with a bias on queries, keys and values."""

from treadle.families.family import Family
from treadle.families.llama import EPS, FEED_FORWARD, HEAD_DIM, LAYER, MODEL, TENSORS, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Windows

# From `max_window_layers` on, layers are local, where windows are switched on at all.
WINDOWS = Windows(
    lambda config, layer: layer >= config.get("max_window_layers", 28),
    window=4096,
    names=("max_window_layers",),
    switch="use_sliding_window",
)

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    model=MODEL,
    layer={**LAYER, "mixer": {"kind": "attention", "position": {"kind": "rope"}, "bias": True}},
    rules=(*sizes(kv_heads=32), HEAD_DIM, EPS, *FEED_FORWARD, WINDOWS, Rope()),
    tensors=TENSORS,
)
