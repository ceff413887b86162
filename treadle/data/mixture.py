"""Which dataset, and which of its samples, is global sample g: in closed form, with no state.

The first source takes the share w_1 of all samples: floor(g w_1) of the samples before g are its own, and the others,
numbered g - floor(g w_1), are divided among the remaining sources in the same way. Shares are exact integers over
2^20.

M samples, K sources.
"""

from collections.abc import Sequence

import numpy as np

from treadle.errors import ConfigError

SCALE_BITS = 20
SCALE = 1 << SCALE_BITS
MAX_SAMPLES = 1 << (63 - SCALE_BITS)


class Mixture:
    """Deals the global samples out to sources in proportion to their weights, at no split more than one sample off."""

    def __init__(self, weights: Sequence[float]):
        if not weights or min(weights) <= 0 or not np.isfinite(weights).all():
            raise ConfigError(f"weights: {list(weights)}; expected one positive number for each dataset")
        self.shares = tuple(self._share(weights, k) for k in range(len(weights) - 1))

    @staticmethod
    def _share(weights: Sequence[float], k: int) -> int:
        """The share of source k among sources k, k + 1, ..., in units of 2^-20."""
        share = round(weights[k] / sum(weights[k:]) * SCALE)
        if not 0 < share < SCALE:
            raise ConfigError(
                f"weights: {list(weights)}; source {k} against those after it is off by more than a factor of {SCALE}, "
                f"which would never draw one of them; leave it out, or raise the small weight"
            )
        return share

    def locate(self, samples_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each global sample: its source, int64 [M], and its number within that source, int64 [M]."""
        rest = np.asarray(samples_M, dtype=np.int64)
        if rest.size and not 0 <= int(rest.min()) <= int(rest.max()) < MAX_SAMPLES:
            raise IndexError(f"global samples {int(rest.min())}..{int(rest.max())} are outside of [0, {MAX_SAMPLES})")
        source = np.full(rest.shape, len(self.shares), dtype=np.int64)
        number = rest.copy()
        open_ = np.ones(rest.shape, dtype=bool)
        for k, share in enumerate(self.shares):
            before = (rest * share) >> SCALE_BITS
            mine = open_ & (((rest + 1) * share) >> SCALE_BITS > before)
            source[mine] = k
            number[mine] = before[mine]
            open_ &= ~mine
            rest = rest - before
        number[open_] = rest[open_]
        return source, number

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` global samples each source gets."""
        counts = []
        for share in self.shares:
            counts.append((samples * share) >> SCALE_BITS)
            samples -= counts[-1]
        return [*counts, samples]
