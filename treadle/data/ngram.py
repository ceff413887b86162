"""A byte n-gram model: what a language model has to beat before it has learned anything.

Interpolated with Witten-Bell smoothing (Witten and Bell 1991; Chen and Goodman 1999, section 2.5). After context h,
p(w | h) = (c(hw) + t(h) p(w | h')) / (c(h) + t(h)), where t(h) is the number of different symbols seen after h, h' is
h without its oldest symbol, and below the single symbols everything is equally likely.

Symbols are the 256 bytes and an end of document. An n-gram is packed into an integer, 9 bits for each symbol, oldest
on top.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from treadle.data.dataset import TokenDataset
from treadle.data.prepare import Prepared
from treadle.data.tokenizer import Tokenizer
from treadle.errors import ConfigError, DataError

END = 256
SYMBOLS = 257
BITS = 9
MAX_ORDER = 64 // BITS
CHUNK = 1 << 22


@dataclass(frozen=True)
class Counts:
    """The n-grams of one order. grams: sorted uint64 [G], with counts int64 [G].

    contexts: sorted uint64 [C], what they begin with; followed int64 [C]: n-grams with that context; distinct int64
    [C]: different ones.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    followed: np.ndarray
    distinct: np.ndarray

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray) -> "Counts":
        contexts, firsts = np.unique(grams >> np.uint64(BITS), return_index=True)
        followed = np.add.reduceat(counts, firsts)
        return cls(grams, counts, contexts, followed, np.diff(np.append(firsts, len(grams))))


class NgramModel:
    """Probabilities of the next symbol after order - 1 earlier ones. Documents begin after ends of document."""

    def __init__(self, documents: Iterable[bytes], order: int = 5):
        """Raises ConfigError for an order that does not fit a packed n-gram, DataError for no text."""
        if not 1 <= order <= MAX_ORDER:
            raise ConfigError(f"n-gram order: {order}; expected 1 to {MAX_ORDER}")
        self.order = order
        grams, counts = np.empty(0, np.uint64), np.empty(0, np.int64)
        for packed in ngrams(documents, order):
            more, frequency = np.unique(packed, return_counts=True)
            grams, counts = merged(np.concatenate([grams, more]), np.concatenate([counts, frequency]))
        if not len(grams):
            raise DataError("the n-gram model has no text to count; the training documents are empty")
        # Each n-gram ends in exactly one (n-1)-gram, so the lower orders follow from the highest.
        self.orders = [Counts.of(grams, counts)]
        for shorter in range(order - 1, 0, -1):
            grams, counts = merged(grams & np.uint64((1 << BITS * shorter) - 1), counts)
            self.orders.insert(0, Counts.of(grams, counts))

    def probabilities(self, packed_M: np.ndarray) -> np.ndarray:
        """The probability of each n-gram's last symbol after the others.  uint64 [M] -> float64 [M]"""
        p_M = np.full(len(packed_M), 1 / SYMBOLS)
        for order, table in enumerate(self.orders, start=1):
            grams_M = packed_M & np.uint64((1 << BITS * order) - 1)
            seen_M = looked_up(grams_M, table.grams, table.counts)
            context_M = grams_M >> np.uint64(BITS)
            followed_M = looked_up(context_M, table.contexts, table.followed)
            distinct_M = looked_up(context_M, table.contexts, table.distinct)
            known = followed_M > 0  # a context never seen leaves the shorter one's opinion
            p_M[known] = (seen_M + distinct_M * p_M)[known] / (followed_M + distinct_M)[known]
        return p_M

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Bits to predict every byte and every end of document, for each byte. Raises DataError for no text."""
        bits, size = 0.0, 0
        for packed in ngrams(documents, self.order):
            different, frequency = np.unique(packed, return_counts=True)
            bits -= float(frequency @ np.log2(self.probabilities(different)))
            size += int(frequency[(different & np.uint64((1 << BITS) - 1)) != END].sum())
        if not size:
            raise DataError("the n-gram model has no text to measure; raise held_out")
        return bits / size


def ngram_bits_per_byte(data: Prepared, order: int = 5) -> dict[str, float]:
    """Of each held-out dataset, by name, by one model of all training documents. Raises DataError, ConfigError."""
    training = chain.from_iterable(texts(dataset, data.tokenizer) for dataset in data.train)
    model = NgramModel(training, order)
    return {name: model.bits_per_byte(texts(dataset, data.tokenizer)) for name, dataset in data.validation.items()}


def texts(dataset: TokenDataset, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The text of each document, in UTF-8."""
    for tokens in dataset.each_document():
        yield tokenizer.decode(tokens.tolist(), special=False).encode()


def ngrams(documents: Iterable[bytes], order: int) -> Iterator[np.ndarray]:
    """The n-gram that ends at each byte of each document, and at its end: packed, in arrays of bounded size."""
    padding = np.full(max(order - 1, 1), END, np.uint64)
    stream = padding[: order - 1]
    pending: list[np.ndarray] = []
    size = 0
    for document in documents:
        for start in range(0, len(document), CHUNK):
            pending.append(np.frombuffer(document, np.uint8)[start : start + CHUNK])
            size += len(pending[-1])
            if size >= CHUNK:
                stream = np.concatenate([stream, *pending], dtype=np.uint64)
                yield windows(stream, order)
                stream, pending, size = stream[len(stream) - order + 1 :], [], 0
        if document:
            pending.append(padding)
    if pending:
        yield windows(np.concatenate([stream, *pending], dtype=np.uint64), order)


def windows(stream: np.ndarray, order: int) -> np.ndarray:
    """Every n-gram of the symbols, packed, but for those that end in the padding after an end of document."""
    count = len(stream) - order + 1
    packed = np.zeros(count, np.uint64)
    for i in range(order):
        packed <<= np.uint64(BITS)
        packed |= stream[i : i + count]
    if order < 2:
        return packed
    last, before = stream[order - 1 :], stream[order - 2 : -1]
    return packed[(last != END) | (before != END)]


def merged(grams: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted, with the counts of equal n-grams added up."""
    order = np.argsort(grams, kind="stable")  # merges sorted runs in one pass
    grams, counts = grams[order], counts[order]
    firsts = np.flatnonzero(np.append(True, grams[1:] != grams[:-1]))
    return grams[firsts], np.add.reduceat(counts, firsts)


def looked_up(keys_M: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each key, 0 where it is not in the sorted table."""
    at = np.minimum(np.searchsorted(table, keys_M), len(table) - 1)
    return np.where(table[at] == keys_M, values[at], 0)
