"""Curves as text, for `treadle runs show`."""

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
# The eight dots of a braille character, by row and column within it: U+2800 plus the sum of the raised dots.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _buckets(values: Sequence[float | None], width: int) -> list[float]:
    """At most `width` means over equal stretches of `values`; NaN where a stretch holds no finite value."""
    width = min(width, len(values))
    means = []
    for column in range(width):
        stretch = values[column * len(values) // width : (column + 1) * len(values) // width]
        finite = [value for value in stretch if value is not None and math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _stretch(values: list[float], width: int) -> list[float]:
    """`values` interpolated to `width` points; a single one becomes a level line."""
    stretched = []
    for column in range(width if values else 0):
        place = column * (len(values) - 1) / (width - 1)
        before = int(place)
        after = min(before + 1, len(values) - 1)
        share = place - before
        stretched.append(values[before] if share == 0 else (1 - share) * values[before] + share * values[after])
    return stretched


def sparkline(values: Sequence[float | None], width: int = 40, from_zero: bool = False) -> str:
    """One line of bars, from the least value (or zero) to the greatest; × where nothing is finite."""
    means = _buckets(values, width)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "×" * len(means)
    low = min(0.0, *finite) if from_zero else min(finite)
    span = max(finite) - low

    def bar(mean: float) -> str:
        if math.isnan(mean):
            return "×"
        return BARS[round((mean - low) / span * (len(BARS) - 1))] if span else BARS[0]

    return "".join(map(bar, means))


def chart(values: Sequence[float | None], width: int = 60, height: int = 8) -> list[str]:
    """A curve in braille dots, `height` lines of `width` characters, the greatest value on top."""
    means = _stretch(_buckets(values, 2 * width), 2 * width)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return []
    low, span = min(finite), max(finite) - min(finite)
    rows = 4 * height
    cells = [[0] * ((len(means) + 1) // 2) for _ in range(height)]
    before: int | None = None
    for column, mean in enumerate(means):
        if math.isnan(mean):
            before = None
            continue
        row = round((1 - (mean - low) / span) * (rows - 1)) if span else rows // 2
        # Join to the point before, so that a steep curve has no holes.
        start, stop = (row, row) if before is None or before == row else (min(row, before + 1), max(row, before - 1))
        for dot in range(start, stop + 1):
            cells[dot // 4][column // 2] |= DOTS[dot % 4][column % 2]
        before = row
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
