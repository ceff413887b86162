"""A stack of layers written shortly: equal neighbours as one with `repeat`, patterns as a `cycle`; and back."""

from typing import Any

LONGEST = 16  # layers of a pattern

Layers = list[dict[str, Any]]


def fold(layers: Layers) -> Layers:
    """The shortest of the plain ways to write these layers; `expand` of the result gives them again."""
    folded: Layers = []
    start = 0
    while start < len(layers):
        period, count = _longest_run(layers, start)
        pattern = layers[start : start + period]
        if period == 1:
            folded.append({**pattern[0], "repeat": count} if count > 1 else pattern[0])
        else:
            folded.append({"kind": "cycle", "repeat": count, "layers": fold(pattern)})
        start += period * count
    return folded


def _longest_run(layers: Layers, start: int) -> tuple[int, int]:
    """The period and count of the repetition from `start` that covers most layers; the shortest such period."""
    best = 1, 1
    for period in range(1, min(LONGEST, len(layers) - start) + 1):
        pattern, count = layers[start : start + period], 1
        while layers[start + count * period : start + (count + 1) * period] == pattern:
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = period, count
    return best
