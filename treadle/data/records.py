"""Records between separators in a file of bytes, read from any byte range, in bounded memory."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from treadle.data.compressed import readable

PIECE_BYTES = 8 << 20
BLOCK = 1 << 20


def cut(size: int, step: int | None) -> Iterator[tuple[int, int]]:
    """[0, size) in ranges of `step`; one range if `step` is None."""
    if step is None:
        yield 0, size
        return
    for start in range(0, size, step):
        yield start, min(start + step, size)


def line_of(path: Path, offset: int) -> int:
    """The number, from 1, of the line that holds byte `offset`."""
    lines = 1
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(BLOCK, offset))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def records(
    path: Path,
    separator: bytes,
    start: int = 0,
    stop: int | None = None,
    *,
    opener: Callable[[Path], IO[bytes]] = plain,
) -> Iterator[tuple[int, bytes]]:
    """(byte offset, record) of each record that begins in [start, stop), separators left out.

    Neighbouring ranges give each record exactly once, if the separator cannot overlap itself. Raises DataError naming
    the file if it cannot be read.
    """
    with readable(path, EOFError, zlib.error), opener(path) as file:
        yield from _records(file, separator, start, stop)


def _records(file: IO[bytes], separator: bytes, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    # From just before `start`, the first record ends at the first separator: it began earlier, and is not ours.
    foreign = start > 0
    offset = max(0, start - len(separator))
    if offset:
        file.seek(offset)
    rest = b""
    while block := file.read(BLOCK):
        *whole, rest = (rest + block).split(separator)
        for record in whole:
            if stop is not None and offset >= stop:
                return
            if not foreign:
                yield offset, record
            foreign = False
            offset += len(record) + len(separator)
    if rest and not foreign and (stop is None or offset < stop):
        yield offset, rest
