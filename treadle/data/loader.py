"""The batches of text: rows of token datasets, dealt by weight for training, in order for evaluation.

Global sample g -> (mixture) a dataset and a sample of it -> (permutation) epoch and row -> tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from treadle.data.batches import Batches, check_division
from treadle.data.dataset import TokenDataset
from treadle.data.mixture import Mixture
from treadle.data.packing import Batch, Rows
from treadle.data.permutation import permute
from treadle.errors import ConfigError, DataError

VERSION = 2  # of what the samples of the same data and settings are; 2: end-of-text opens the next document


class Loader(Batches):
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
        super().__init__(batch_size, rank, world)
        self.datasets, self.mixture = list(datasets), Mixture(weights)
        self.sequence_length, self.seed, self.isolate_documents = sequence_length, seed, isolate_documents

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

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "datasets": [dataset.fingerprint for dataset in self.datasets],
            "shares": list(self.mixture.shares),
            "sequence_length": self.sequence_length,
            "isolate_documents": self.isolate_documents,
            "seed": self.seed,
        }

    def _begins(self, source: int, numbers: np.ndarray) -> list[int]:
        """Where in its dataset each sample of `source` begins: each epoch is another permutation of the rows."""
        rows = self.datasets[source].rows(self.sequence_length)
        epochs, index = np.divmod(numbers, rows)
        placed = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            placed[mine] = permute(index[mine], rows, self.seed, source, epoch)
        return (placed * self.sequence_length).tolist()


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
