"""Gemma 3 for text (arXiv:2503.19786): five local layers, then a global one that has a longer theta; normed queries
and keys instead of capped scores. For the scale of the embedding see `gemma2`."""

from collections.abc import Mapping
from typing import Any

from treadle.families.family import Family
from treadle.families.gemma2 import LAYER, NORM, RULES, TENSORS
from treadle.families.rope import Rope
from treadle.families.rules import Key, Windows

PATTERN = "sliding_window_pattern"  # transformers 5 writes it with an underscore, beside layer_types


def is_local(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % int(config.get(PATTERN, 6)) != 0


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    model={"norm": NORM},
    layer={**LAYER, "mixer": {"kind": "attention", "position": {"kind": "rope"}, "qk_norm": NORM}},
    rules=(
        *RULES,
        Key("final_logit_softcapping", "softcap", default=None),
        Windows(is_local, window=4096, names=(PATTERN, f"_{PATTERN}")),
        Rope(theta=1e6, where=lambda layer: layer["mixer"]["window"] is None, layer_type=Windows.FULL),
        Rope(
            where=lambda layer: layer["mixer"]["window"] is not None,
            layer_type=Windows.LOCAL,
            legacy=("rope_local_base_freq", "partial_rotary_factor"),
        ),
    ),
    tensors=TENSORS,
)
