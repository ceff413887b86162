"""A stream of tokens on disk, made of documents that each end in the end-of-text token.

The stream is cut into parts (files); nothing is read before it is asked for. R rows, T tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from treadle.errors import ConfigError, DataError

BLOCK = 1 << 22  # tokens looked at in one go where all are


@dataclass(frozen=True)
class Part:
    """Tokens of consecutive whole documents. offsets: int64 [documents + 1], where each begins, and the end."""

    path: str
    tokens: np.ndarray
    offsets: np.ndarray


class TokenDataset:
    """The stream over all parts, read by position.

    tokens, documents: their number. bytes: of the source text, in UTF-8; None where it is not known.
    vocab_size: every id is below it; None where it is not known. fingerprint: sha256 of what is in it.
    """

    def __init__(
        self,
        path: str,
        parts: Sequence[Part],
        *,
        fingerprint: str,
        bytes: int | None = None,
        vocab_size: int | None = None,
        tokenizer: str | None = None,
    ):
        self.path = path
        self.parts = list(parts)
        self.fingerprint = fingerprint
        self.bytes = bytes
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.starts = np.cumsum([0, *(len(part.tokens) for part in self.parts)], dtype=np.int64)
        self.tokens = int(self.starts[-1])
        self.documents = sum(len(part.offsets) - 1 for part in self.parts)

    def rows(self, sequence_length: int) -> int:
        """How many whole rows of `sequence_length` inputs and targets there are."""
        return max(0, self.tokens - 1) // sequence_length

    def read(self, start: int, inputs_T: np.ndarray, targets_T: np.ndarray) -> list[int]:
        """Fill in tokens [start, start + T) and their successors, from one position on.

        Returns where, from 1 to T, documents begin after `start`, relative to it, in order; a place twice where a
        document is empty. Raises DataError for an id that is not in the vocabulary.
        """
        length = len(inputs_T)
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        part, first = self.parts[index], start - int(self.starts[index])
        if first + length + 1 > len(part.tokens):
            return self._read_across(start, inputs_T, targets_T)
        tokens = part.tokens[first : first + length + 1]
        self._check(tokens, part, first)
        inputs_T[:] = tokens[:-1]
        targets_T[:] = tokens[1:]
        low = int(part.offsets.searchsorted(first, side="right"))
        high = int(part.offsets.searchsorted(first + length, side="right"))
        return (part.offsets[low:high] - first).tolist()

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, in the order of the stream, with its end-of-text token."""
        for part in self.parts:
            count = len(part.offsets) - 1
            if number < count:
                return part.tokens[part.offsets[number] : part.offsets[number + 1]]
            number -= count
        raise IndexError(f"{self.path}: there are {self.documents} documents")

    def each_document(self) -> Iterator[np.ndarray]:
        for part in self.parts:
            for start, stop in zip(part.offsets[:-1], part.offsets[1:], strict=True):
                yield part.tokens[start:stop]

    def ended(self, last: np.ndarray) -> np.ndarray:
        """Whether documents with these last tokens have an end-of-text token, bool [documents]."""
        return np.ones(len(last), dtype=bool)

    def first_and_last_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The first token of each document that is not empty, and the last one."""
        firsts, lasts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for part in self.parts:
            filled = np.diff(part.offsets) > 0
            firsts.append(part.tokens[part.offsets[:-1][filled]].astype(np.int64))
            lasts.append(part.tokens[part.offsets[1:][filled] - 1].astype(np.int64))
        return np.concatenate(firsts), np.concatenate(lasts)

    def largest_id(self) -> int:
        """Of all tokens, which are read; -1 if there are none."""
        return max((int(block.max()) for block in self.blocks()), default=-1)

    def blocks(self) -> Iterator[np.ndarray]:
        """All tokens in order, some at a time."""
        for part in self.parts:
            for first in range(0, len(part.tokens), BLOCK):
                yield part.tokens[first : first + BLOCK]

    def attended_length(self, sequence_length: int) -> float:
        """Mean over tokens of the length of their document, in rows of `sequence_length` that isolate documents."""
        lengths = np.concatenate([np.diff(part.offsets) for part in self.parts]).astype(np.float64)
        return float((lengths * np.minimum(lengths, sequence_length)).sum() / max(lengths.sum(), 1.0))

    def verify(self) -> None:
        """Read everything, and check it. Raises DataError naming the file, what was expected, and what was found."""
        for part in self.parts:
            steps = np.diff(part.offsets)
            if (
                len(part.offsets) == 0
                or part.offsets[0] != 0
                or part.offsets[-1] != len(part.tokens)
                or (steps < 0).any()
            ):
                raise DataError(
                    f"{part.path}: document offsets do not rise from 0 to {len(part.tokens)}, the number of tokens"
                )
            for first in range(0, len(part.tokens), BLOCK):
                self._check(part.tokens[first : first + BLOCK], part, first)

    def _check(self, tokens: np.ndarray, part: Part, first: int) -> None:
        if not len(tokens):
            return
        if self.vocab_size is not None and int(tokens.max()) >= self.vocab_size:
            wrong, expected = tokens >= self.vocab_size, f"an id below the vocabulary size {self.vocab_size}"
        elif tokens.dtype.kind == "i" and int(tokens.min()) < 0:
            wrong, expected = tokens < 0, "an id of at least 0"
        else:
            return
        at = int(wrong.argmax())
        raise DataError(
            f"{part.path}: token {first + at} is {int(tokens[at])}, expected {expected}; prepare the data again with "
            f"this tokenizer"
        )

    def _read_across(self, start: int, inputs_T: np.ndarray, targets_T: np.ndarray) -> list[int]:
        """`read` for the few rows that lie in more than one part."""
        stop = start + len(inputs_T) + 1
        if stop > self.tokens:
            raise IndexError(f"{self.path}: tokens [{start}, {stop}) of {self.tokens}")
        row = np.empty(stop - start, dtype=np.int64)
        begins: list[int] = []
        for part, begin in zip(self.parts, self.starts[:-1].tolist(), strict=True):
            low, high = max(start - begin, 0), min(stop - begin, len(part.tokens))
            if low < high:
                self._check(part.tokens[low:high], part, low)
                row[begin + low - start : begin + high - start] = part.tokens[low:high]
                inside = part.offsets[(part.offsets >= low) & (part.offsets < high)] + (begin - start)
                begins += inside[inside > 0].tolist()
        inputs_T[:] = row[:-1]
        targets_T[:] = row[1:]
        return begins

    @cached_property
    def dtype(self) -> np.dtype:
        return self.parts[0].tokens.dtype


def check_vocabulary(datasets: Iterable[TokenDataset], vocab_size: int) -> None:
    """Raise ConfigError for a dataset whose ids a model of `vocab_size` tokens does not have.

    Ids are compared by the dataset's own vocabulary, which reading enforces; all are read where it is not known.
    """
    for dataset in datasets:
        if dataset.vocab_size is not None and dataset.vocab_size > vocab_size:
            found = f"its vocabulary has {dataset.vocab_size} tokens"
            least = dataset.vocab_size
        elif dataset.vocab_size is None and (largest := dataset.largest_id()) >= vocab_size:
            found, least = f"its largest token id is {largest}", largest + 1
        else:
            continue
        raise ConfigError(
            f"{dataset.path}: {found}, but model.vocab_size is {vocab_size}; set model.vocab_size to at least {least}, "
            f"or use data prepared with the model's tokenizer"
        )
