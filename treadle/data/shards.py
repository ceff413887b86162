"""Token shards: raw token files that are memory-mapped, with a manifest that says what must be in them.

A folder holds `manifest.json`, and for each shard `00000.tokens` (little-endian uint16 or uint32) and `00000.offsets`
(little-endian int64: where each document begins, and the end). The manifest is written last: without it there is no
dataset.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from treadle.config import Config
from treadle.data.dataset import Part, TokenDataset
from treadle.errors import DataError
from treadle.tracking.files import write_atomically

FORMAT = "treadle-tokens"
VERSION = 1
MANIFEST = "manifest.json"
TRAIN, VALIDATION = "train", "validation"  # the two folders of shards that text is divided into
SHARD_TOKENS = 1 << 28  # 512 MiB of uint16
AGAIN = "copy the folder again, or delete it and prepare the data again"


class FileEntry(Config):
    """A file as it was written."""

    name: str
    size: NonNegativeInt
    sha256: str


class Shard(Config):
    """One shard: whole documents."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    tokens_file: FileEntry
    offsets_file: FileEntry


class Manifest(Config):
    """What a folder of shards holds. bytes: of the source text in UTF-8; tokenizer: its fingerprint."""

    format: Literal["treadle-tokens"] = "treadle-tokens"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: PositiveInt
    tokenizer: str
    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    shards: tuple[Shard, ...]


class HashedFile:
    """A file that is only appended to, with its size and sha256."""

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self._file: IO[bytes] = path.open("wb")
        self._hash = hashlib.sha256()

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(name=self.path.name, size=self.size, sha256=self._hash.hexdigest())


class ShardWriter:
    """Writes documents into a new folder, a shard at a time, in memory that does not grow with their number.

        with ShardWriter(folder, vocab_size=..., tokenizer=...) as writer:
            writer.write(tokens, lengths, source_bytes)

    The manifest is written when the block ends without an error.
    """

    def __init__(self, folder: Path | str, *, vocab_size: int, tokenizer: str, shard_tokens: int = SHARD_TOKENS):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise DataError(f"{self.folder}: not empty; token shards are written into a new folder")
        self.vocab_size, self.tokenizer, self.shard_tokens = vocab_size, tokenizer, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.bytes = 0
        self._shards: list[Shard] = []
        self._open: tuple[HashedFile, HashedFile] | None = None
        self._tokens = self._documents = 0

    def write(self, tokens: np.ndarray, lengths: np.ndarray, source_bytes: int = 0) -> None:
        """Append documents. tokens: ids [sum of lengths]; lengths: int [documents]; source_bytes: of their text."""
        if len(tokens) != int(np.sum(lengths)):
            raise ValueError(f"{len(tokens)} tokens, but the lengths sum to {int(np.sum(lengths))}")
        if len(tokens) and (int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0):
            raise DataError(f"a token id is outside of the vocabulary of {self.vocab_size}")
        self.bytes += source_bytes
        ends = np.cumsum(lengths, dtype=np.int64)
        done = written = 0
        while done < len(ends):
            # As many documents as keep the shard within its limit, but never an empty shard.
            room = self.shard_tokens - self._tokens
            count = int(np.searchsorted(ends[done:] - written, room, side="right"))
            if count == 0 and self._documents:
                self._finish_shard()
                continue
            last = done + max(count, 1)
            self._append(tokens[written : ends[last - 1]], ends[done:last] - written)
            done, written = last, int(ends[last - 1])

    def _append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        if self._open is None:
            stem = self.folder / f"{len(self._shards):05d}"
            self._open = HashedFile(stem.with_suffix(".tokens")), HashedFile(stem.with_suffix(".offsets"))
            self._open[1].append(np.zeros(1, dtype="<i8"))
        self._open[0].append(tokens.astype(self.dtype, copy=False))
        self._open[1].append((ends + self._tokens).astype("<i8", copy=False))
        self._tokens += len(tokens)
        self._documents += len(ends)

    def _finish_shard(self) -> None:
        if self._open is None:
            return
        tokens, offsets = (file.close() for file in self._open)
        shard = Shard(documents=self._documents, tokens=self._tokens, tokens_file=tokens, offsets_file=offsets)
        self._shards.append(shard)
        self._open, self._tokens, self._documents = None, 0, 0

    def finish(self) -> Manifest:
        """Close the last shard and write the manifest."""
        self._finish_shard()
        manifest = Manifest(
            dtype="uint16" if self.dtype.itemsize == 2 else "uint32",
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            bytes=self.bytes,
            shards=tuple(self._shards),
        )
        write_atomically(self.folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1).encode())
        return manifest

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.finish()
        elif self._open is not None:
            for file in self._open:
                file.close()


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a folder of shards. Raises DataError if it is missing, damaged or of another format."""
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file, so {folder} holds no finished token shards; `treadle data prepare` makes them"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}; {AGAIN}") from error
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise DataError(f"{path}: format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        raise DataError(f"{path}: damaged: {where}: {first['msg']}; {AGAIN}") from error
    for key in ("documents", "tokens"):
        total = sum(getattr(shard, key) for shard in manifest.shards)
        if total != getattr(manifest, key):
            raise DataError(f"{path}: damaged: {key} is {getattr(manifest, key)}, its shards have {total}")
    return manifest


class ShardDataset(TokenDataset):
    """The documents of a folder of shards, memory-mapped. Opening checks every file's size, `verify` the content."""

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        self.folder = folder
        self.manifest = manifest = read_manifest(folder)
        dtype = np.dtype("<u2" if manifest.dtype == "uint16" else "<u4")
        parts = []
        for shard in manifest.shards:
            tokens = mapped(folder, shard.tokens_file, dtype, shard.tokens)
            offsets = mapped(folder, shard.offsets_file, np.dtype("<i8"), shard.documents + 1)
            if offsets[0] != 0 or offsets[-1] != shard.tokens:
                raise DataError(
                    f"{folder / shard.offsets_file.name}: documents run from {offsets[0]} to {offsets[-1]}, "
                    f"expected 0 to {shard.tokens}; {AGAIN}"
                )
            parts.append(Part(str(folder / shard.tokens_file.name), tokens, offsets))
        content = json.dumps(manifest.model_dump(mode="json"), sort_keys=True)
        super().__init__(
            str(folder),
            parts,
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
            bytes=manifest.bytes,
            vocab_size=manifest.vocab_size,
            tokenizer=manifest.tokenizer,
        )

    def verify(self) -> None:
        """Compare every file with its checksum, then its content. Raises DataError."""
        for shard in self.manifest.shards:
            for entry in (shard.tokens_file, shard.offsets_file):
                with (self.folder / entry.name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != entry.sha256:
                    raise DataError(
                        f"{self.folder / entry.name}: sha256 {found[:16]}…, expected {entry.sha256[:16]}…: the file "
                        f"has changed since it was written; {AGAIN}"
                    )
        super().verify()


def mapped(folder: Path, entry: FileEntry, dtype: np.dtype, count: int) -> np.ndarray:
    """A file as a read-only array, once its size is what the manifest says. Raises DataError."""
    path = folder / entry.name
    if path.name != entry.name or path.parent != folder:
        raise DataError(f"{folder / MANIFEST}: damaged: '{entry.name}' is no plain file name")
    expected = count * dtype.itemsize
    if entry.size != expected:
        raise DataError(
            f"{folder / MANIFEST}: damaged: {entry.name} has {entry.size} bytes for {count} values of {dtype}"
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: missing, expected {expected} bytes; {AGAIN}") from error
    if size != expected:
        raise DataError(f"{path}: {size} bytes, expected {expected}; {AGAIN}")
    # As a plain array: slicing the memmap class costs several times more.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,))) if count else np.empty(0, dtype)
