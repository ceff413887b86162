"""Batches by step number: `loader.batch(step)` depends on the step alone, so a run resumes anywhere, on any ranks.

Global sample g -> (mixture) a dataset and a sample of it -> (permutation) epoch and row -> tokens.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from treadle.data.dataset import TokenDataset
from treadle.data.mixture import Mixture
from treadle.data.packing import Batch, Rows
from treadle.data.permutation import permute
from treadle.data.prefetch import Prefetch
from treadle.errors import ConfigError, DataError

VERSION = 2  # of what the samples of the same data and settings are; 2: end-of-text opens the next document


class Loader:
    """The training batches of some datasets, mixed by weight.

    batch_size: rows of a global batch; each of `world` ranks gets a contiguous part of them. Raises DataError for a
    dataset shorter than one row, ConfigError for a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        weights: Sequence[float] | None = None,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        isolate_documents: bool = True,
    ):
        weights = [dataset.tokens for dataset in datasets] if weights is None else list(weights)
        if len(weights) != len(datasets):
            raise ConfigError(f"weights: {weights}; expected one for each of the {len(datasets)} datasets")
        for dataset in datasets:
            if dataset.rows(sequence_length) == 0:
                raise DataError(
                    f"{dataset.path}: {dataset.tokens} tokens are less than one row of sequence_length + 1 = "
                    f"{sequence_length + 1}; add text, or lower sequence_length"
                )
        check_division(batch_size, world)
        self.datasets, self.mixture = list(datasets), Mixture(weights)
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.rank, self.world, self.isolate_documents = rank, world, isolate_documents

    def batch(self, step: int) -> Batch:
        """This rank's rows of global batch `step`."""
        return self.samples(*self._range(step))

    def micro_batches(self, step: int, rows: int) -> list[Batch]:
        """The same rows as `batch(step)`, in batches of `rows` rows (the last may be smaller)."""
        start, stop = self._range(step)
        return [self.samples(first, min(first + rows, stop)) for first in range(start, stop, rows)]

    def samples(self, start: int, stop: int) -> Batch:
        """Global samples [start, stop) as one batch."""
        samples = np.arange(start, stop, dtype=np.int64)
        sources, numbers = self.mixture.locate(samples)
        rows = Rows(len(samples), self.sequence_length, self.isolate_documents)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            begins = self._begins(source, numbers[mine])
            for row, begin in zip(mine.tolist(), begins, strict=True):
                rows.fill(row, self.datasets[source], begin)
        return rows.batch(sources, samples)

    def iterate(self, start: int = 0, stop: int | None = None, *, depth: int = 2) -> Prefetch[Batch]:
        """Batches from step `start` on, made ahead by a thread, in pinned memory where there is a GPU."""
        return Prefetch(self._pinned(self.batch), start, stop, depth=depth)

    def iterate_micro(
        self, rows: int, start: int = 0, stop: int | None = None, *, depth: int = 2
    ) -> Prefetch[list[Batch]]:
        """`micro_batches` of each step from `start` on, made ahead by a thread, pinned where there is a GPU."""
        return Prefetch(self._pinned(partial(self.micro_batches, rows=rows)), start, stop, depth=depth)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to go on where it stopped, by name."""
        return {
            "version": VERSION,
            "datasets": [dataset.fingerprint for dataset in self.datasets],
            "shares": list(self.mixture.shares),
            "sequence_length": self.sequence_length,
            "isolate_documents": self.isolate_documents,
            "seed": self.seed,
        }

    def state(self, step: int) -> dict[str, Any]:
        """All that is needed to go on with global batch `step`: a few integers and strings, for JSON."""
        return {"samples": step * self.batch_size, "batch_size": self.batch_size, "fingerprint": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """The step to go on with. Ranks and micro-batches may differ; raises DataError if the data or its order do."""
        for key, now in self.fingerprint.items():
            then = state["fingerprint"].get(key)
            if then != now:
                raise DataError(
                    f"data.{key}: the run was stopped with {shown(then)} and is resumed with {shown(now)}, which would "
                    f"change its samples; restore the data and settings of that run, or start a new run"
                )
        step, left = divmod(state["samples"], self.batch_size)
        if left:
            raise DataError(
                f"the run has used {state['samples']} samples in batches of {state['batch_size']}; a batch size of "
                f"{self.batch_size} cannot go on from there; choose one that divides {state['samples']}"
            )
        return int(step)

    def _range(self, step: int) -> tuple[int, int]:
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        return start, start + share

    def _begins(self, source: int, numbers: np.ndarray) -> list[int]:
        """Where in its dataset each sample of `source` begins: each epoch is another permutation of the rows."""
        rows = self.datasets[source].rows(self.sequence_length)
        epochs, index = np.divmod(numbers, rows)
        placed = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            placed[mine] = permute(index[mine], rows, self.seed, source, epoch)
        return (placed * self.sequence_length).tolist()

    @staticmethod
    def _pinned(make: Callable[[int], Any]) -> Callable[[int], Any]:
        if not torch.cuda.is_available():
            return make

        def pinned(step: int) -> Any:
            made = make(step)
            return [batch.pin_memory() for batch in made] if isinstance(made, list) else made.pin_memory()

        return pinned


class Sequential:
    """Every token of one dataset once, in order: the batches of an evaluation.

    The last row is filled up with ignored targets, and so are whole rows where the ranks' batches would not be equal in
    number. bytes: of the whole source text; None where the dataset does not know it.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        isolate_documents: bool = True,
    ):
        check_division(batch_size, world)
        if dataset.tokens < 2:
            raise DataError(f"{dataset.path}: {dataset.tokens} tokens leave nothing to predict")
        self.dataset, self.sequence_length, self.batch_size = dataset, sequence_length, batch_size
        self.rank, self.world, self.isolate_documents = rank, world, isolate_documents
        self.rows = -(-(dataset.tokens - 1) // sequence_length)
        self.bytes = dataset.bytes

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def batch(self, index: int) -> Batch:
        """This rank's rows of batch `index`."""
        share = self.batch_size // self.world
        first = index * self.batch_size + self.rank * share
        rows = Rows(share, self.sequence_length, self.isolate_documents)
        for row in range(share):
            if first + row < self.rows:
                rows.fill(row, self.dataset, (first + row) * self.sequence_length)
            else:
                rows.leave_empty(row)
        return rows.batch(np.zeros(share, np.int64), np.arange(first, first + share))

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(index) for index in range(len(self)))

    def predicted_bytes(self, token_bytes: np.ndarray, opening_bytes: np.ndarray | None = None) -> int:
        """Bytes of the text behind the targets, on all ranks: what a sum of losses is divided by for bits per byte.

        It is `bytes` (counted from the tokens where that is not known) less what is given and not predicted: the
        stream's first token, and the first token after an isolated document without an end-of-text token.

        token_bytes: int [vocab_size], `Tokenizer.token_bytes()`. opening_bytes: the same for a token that opens a
        document, `Tokenizer.token_bytes(opening=True)`; it differs where a word is written with the space before it.
        """
        opening_bytes = token_bytes if opening_bytes is None else opening_bytes
        first, last = self.dataset.first_and_last_tokens()
        given = np.zeros(len(first), dtype=bool)
        given[1:] = self.isolate_documents & ~self.dataset.ended(last[:-1])
        given[0] = True
        total = self.dataset.bytes
        if total is None:
            total = sum(int(token_bytes[tokens].sum()) for tokens in self.dataset.blocks())
            total += int(opening_bytes[first].sum() - token_bytes[first].sum())
        return int(total - opening_bytes[first[given]].sum())


def check_division(batch_size: int, world: int) -> None:
    if batch_size <= 0 or batch_size % world:
        raise ConfigError(f"batch_size: {batch_size} rows cannot be shared out equally to {world} ranks")


def shown(value: Any) -> str:
    """Short enough for a message, yet different for different values."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
