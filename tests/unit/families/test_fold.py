"""Stacks written shortly mean the same stack."""

import random
from typing import Any

import pytest

from treadle.config import resolve, to_dict
from treadle.families.fold import fold
from treadle.nn.transformer import TransformerConfig

LAYER = {"kind": "pre_norm", "feedforward": {"kind": "gated", "dim": 8}}


def layer(window: int | None) -> dict[str, Any]:
    return {**LAYER, "mixer": {"kind": "attention", "heads": 2, "window": window}}


def unfolded(layers: list[dict[str, Any]]) -> list[Any]:
    """The windows of a stack as `expand` gives it."""
    spec = resolve(TransformerConfig, {"dim": 8, "vocab_size": 8, "max_length": 8, "layers": layers})
    return [to_dict(entry)["mixer"]["window"] for entry in spec.expand()]


@pytest.mark.parametrize("seed", range(40))
def test_expanded_again_it_is_the_same_stack(seed: int) -> None:
    chance = random.Random(seed)
    kinds = chance.randint(1, 3)
    stack = [chance.randint(1, kinds) for _ in range(chance.randint(1, 40))]
    if seed % 2:  # a pattern, cut off somewhere
        pattern = stack[: chance.randint(1, 6)]
        stack = (pattern * 12)[: chance.randint(1, 40)]
    folded = fold([layer(window) for window in stack])
    assert unfolded(folded) == stack
    assert len(folded) <= len(stack)


def short(entry: dict[str, Any]) -> Any:
    """What an entry says, without what all layers share: 3 x window, or 3 x [pattern]."""
    if entry["kind"] == "cycle":
        return entry["repeat"], [short(part) for part in entry["layers"]]
    return entry.get("repeat", 1), entry["mixer"]["window"]


L, G = 8, None  # local, global


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        pytest.param([G] * 32, [(32, G)], id="Llama"),
        pytest.param([L, G] * 12, [(12, [(1, L), (1, G)])], id="GPT-OSS, Gemma 2"),
        pytest.param(([L] * 5 + [G]) * 8, [(8, [(5, L), (1, G)])], id="Gemma 3, whole"),
        pytest.param(([L] * 5 + [G]) * 4 + [L, L], [(4, [(5, L), (1, G)]), (2, L)], id="Gemma 3, cut off"),
        pytest.param([1] * 3 + [2] * 58, [(3, 1), (58, 2)], id="DeepSeek-V3"),
        pytest.param([1], [(1, 1)], id="a single layer"),
        pytest.param([1, 2, 3], [(1, 1), (1, 2), (1, 3)], id="all different"),
    ],
)
def test_known_patterns(stack: list[int | None], told: list[Any]) -> None:
    assert [short(entry) for entry in fold([layer(window) for window in stack])] == told


def test_nothing() -> None:
    assert fold([]) == []
