"""A permutation of [0, n) that is computed, not stored: a keyed Feistel network with cycle walking.

Any entry costs a few hashes, so an epoch's order needs no memory and starts anywhere (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains").
"""

import numpy as np

ROUNDS = 6  # even, so that the halves end where they began
MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 -> well mixed uint64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_keys(key: tuple[int, ...]) -> list[np.ndarray]:
    """One uint64 [1] for each round, from any integers, in order."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix((state + np.uint64(0x9E3779B97F4A7C15)) ^ mix(np.array([part & MASK], dtype=np.uint64)))
    return [mix(state + np.uint64((i + 1) * 0x9E3779B97F4A7C15 & MASK)) for i in range(ROUNDS)]


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Where the permutation of [0, n) that `key` names sends each index.  int [M] -> int64 [M]

    Raises IndexError for an index outside of [0, n).
    """
    index = np.asarray(index)
    if index.size and (int(index.min()) < 0 or int(index.max()) >= n):
        raise IndexError(f"index {int(index.min())}..{int(index.max())} is outside of [0, {n})")
    keys, bits = round_keys(key), max(1, (n - 1).bit_length())
    x = _feistel(index.astype(np.uint64), bits, keys)
    # The network permutes [0, 2^bits), at most twice n: follow each cycle until it comes back below n.
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = _feistel(x[outside], bits, keys)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, keys: list[np.ndarray]) -> np.ndarray:
    low_bits, high_bits = (bits + 1) // 2, bits // 2
    for key in keys:
        low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
        high, low = x >> np.uint64(low_bits), x & low_mask
        x = (low << np.uint64(high_bits)) | (high ^ (mix(low + key) & high_mask))
        low_bits, high_bits = high_bits, low_bits  # the old low half is now on top
    return x
