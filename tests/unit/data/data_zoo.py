"""Small token datasets whose content is known."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treadle.data.shards import ShardDataset, ShardWriter

EOS = 0


def documents(lengths: Sequence[int], first: int = 1) -> list[list[int]]:
    """Documents of these lengths, end included, whose tokens are `first` and on: each token tells where it is from."""
    result = []
    for length in lengths:
        result.append([*range(first, first + length - 1), EOS])
        first += length - 1
    return result


def written(
    folder: Path, texts: Sequence[Sequence[int]], *, shard_tokens: int = 1 << 20, vocab: int = 60_000
) -> ShardDataset:
    """The documents as a dataset on disk; their text is said to have two bytes for each token."""
    with ShardWriter(folder, vocab_size=vocab, tokenizer="zoo", shard_tokens=shard_tokens) as writer:
        for text in texts:
            writer.write(np.array(text, dtype=np.int64), np.array([len(text)]), 2 * len(text))
    return ShardDataset(folder)


def shape(seed: int, count: int, longest: int) -> list[int]:
    """Lengths of documents."""
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


def die(*_: object) -> None:
    """What a worker does that runs out of memory."""
    os._exit(9)
