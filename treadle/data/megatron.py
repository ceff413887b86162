"""Megatron-LM's indexed datasets: tokens in `prefix.bin`, lengths and documents in `prefix.idx`.

The index, little-endian: b"MMIDIDX\\0\\0", version uint64 = 1, dtype code uint8, sequences uint64, documents uint64
(with the end counted), lengths int32 [sequences], byte positions int64 [sequences], documents int64 [documents]: the
first sequence of each, and the end. From Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import hashlib
import struct
from pathlib import Path

import numpy as np

from treadle.data.dataset import Part, TokenDataset
from treadle.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point


class MegatronDataset(TokenDataset):
    """The documents of `prefix.bin` and `prefix.idx`, memory-mapped.

    Ids are checked against `vocab_size` where it is given. A document ends in an end-of-text token if its last token is
    `eos_id`: Megatron's preprocessing appends one only when asked to. Raises DataError for a file that is missing, cut
    short, or not laid out as described above.
    """

    def __init__(self, prefix: Path | str, *, vocab_size: int | None = None, eos_id: int | None = None):
        self.eos_id = eos_id
        self.index, self.data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        dtype, lengths, documents = read_index(self.index)
        ends = np.cumsum(lengths, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        try:
            size = self.data.stat().st_size
        except OSError as error:
            raise DataError(f"{self.data}: missing, expected beside {self.index}") from error
        if size != total * dtype.itemsize:
            raise DataError(
                f"{self.data}: {size} bytes, expected {total * dtype.itemsize}, as {self.index} says; copy it again"
            )
        tokens = np.asarray(np.memmap(self.data, dtype=dtype, mode="r")) if size else np.empty(0, dtype)
        offsets = np.concatenate([[0], ends])[documents].astype(np.int64)
        digest = hashlib.sha256(self.index.read_bytes()).hexdigest()
        # The index has no checksum of the tokens; their size and time stand in for one.
        digest = hashlib.sha256(f"{digest} {size} {self.data.stat().st_mtime_ns}".encode()).hexdigest()
        super().__init__(
            str(prefix), [Part(str(self.data), tokens, offsets)], fingerprint=digest, vocab_size=vocab_size
        )

    def ended(self, last: np.ndarray) -> np.ndarray:
        return np.zeros(len(last), dtype=bool) if self.eos_id is None else last == self.eos_id


def read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """The tokens' dtype, the length of each sequence, and the first sequence of each document, with the end."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give the prefix, without .bin or .idx") from error
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise DataError(f"{path}: begins with {content[:9]!r}, expected {MAGIC!r}; not a Megatron index")
    _, version, code, sequences, documents = HEADER.unpack_from(content)
    if version != 1:
        raise DataError(f"{path}: version {version}, expected 1")
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code {code}, expected an integer type, one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    # Multimodal data has one more byte for each sequence, its mode.
    if len(content) not in (expected, expected + sequences):
        raise DataError(f"{path}: {len(content)} bytes, expected {expected} for {sequences} sequences; copy it again")
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    firsts = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)
    dtype = np.dtype(DTYPES[code])
    if (lengths < 0).any():
        raise DataError(f"{path}: damaged: a sequence has the length {lengths.min()}")
    laid_out = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    if (pointers != laid_out).any():
        at = int((pointers != laid_out).argmax())
        raise DataError(
            f"{path}: sequence {at} is at byte {pointers[at]}, expected {laid_out[at]}, right after the one before"
        )
    if not len(firsts) or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise DataError(f"{path}: damaged: the documents do not rise from 0 to {sequences}, the number of sequences")
    return dtype, lengths, firsts
