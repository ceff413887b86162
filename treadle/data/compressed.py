"""Compressed files as plain bytes, and the optional libraries that reading needs."""

import gzip
import io
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
    """The file's uncompressed bytes, for .gz and .zst, else the file itself."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(ZstdFile(path), 1 << 20)
    return path.open("rb")


class ZstdFile(io.RawIOBase):
    """The uncompressed bytes of a file of zstd frames, read once from the start.

    The library's own reader takes a file that was cut short for a whole one; this one raises EOFError.
    """

    def __init__(self, path: Path):
        self._library = extra("zstandard")
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (compressed := self._file.read(1 << 16)):
            self._ready = memoryview(self._decompressed(compressed))
        if not self._ready and self._frame is not None:
            raise EOFError("the file ends within a zstd frame; it was cut short")
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, compressed: bytes) -> bytes:
        data = b""
        while compressed:
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                data += self._frame.decompress(compressed)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return data

    def close(self) -> None:
        self._file.close()
        super().close()
