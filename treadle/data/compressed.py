"""Compressed files as plain bytes, the errors of reading, and the optional libraries that it needs."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from treadle.errors import DataError


def extra(module: str) -> Any:
    """Import an optional library. Raises DataError with the install command when it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{module} is not installed, and this source needs it: pip install 'treadle[data]'") from error


def opened(path: Path) -> IO[bytes]:
    """The file's uncompressed bytes, for .gz and .zst, else the file itself. Reading one that was cut short raises."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        stream: IO[bytes] = extra("pyarrow").input_stream(str(path), compression="zstd")
        return stream
    return path.open("rb")


@contextmanager
def readable(path: Path | str, *errors: type[Exception]) -> Iterator[None]:
    """Turns OSError and the `errors` of a reading library into a DataError that names the file."""
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except expected as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
