"""Where documents come from: each kind of source lists its pieces, and reads the documents of a piece in order.

A piece is a part of a source that can be read on its own (a file, a byte range, a run of rows). The list of pieces
depends on the files only, never on how many workers read them.
"""

import glob
import sysconfig
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, field_validator

from treadle.config import Kind
from treadle.data.compressed import extra, opened, readable
from treadle.data.records import PIECE_BYTES, cut, line_of, records
from treadle.errors import DataError

NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Piece:
    """Part [start, stop) of `path`, in the source's own unit (bytes, row groups, rows, shards); `size` in bytes."""

    path: str
    start: int = 0
    stop: int | None = None
    size: int = 0


class SourceConfig(Kind):
    """One corpus. Documents come in an order that depends on the files only; empty documents are left out."""

    weight: PositiveFloat | None = Field(
        None, description="share of the training samples, relative to the other sources; none: by number of tokens"
    )

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """All parts, in order. Raises DataError if there are none."""

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[str]:
        """The documents of one piece. Raises DataError naming the file, and the line where there is one."""

    def signature(self) -> Any:
        """What tells this corpus from another without reading it: the config, and each file's size and time."""
        paths = sorted({piece.path for piece in self.pieces()})
        stats = [(path, Path(path).stat()) for path in paths if Path(path).is_file()]
        config = self.model_dump(mode="json", exclude={"weight"})
        return {"config": config, "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]}

    def documents(self) -> Iterator[str]:
        """Every document. Raises DataError if there is none."""
        empty = True
        for piece in self.pieces():
            for document in self.read(piece):
                empty = False
                yield document
        if empty:
            raise DataError(f"source {self.model_dump(mode='json')}: every document is empty; check the paths")


class FilesConfig(SourceConfig):
    """Base of the sources that are a list of files."""

    paths: list[str] = Field(min_length=1, description="files, folders or globs (** enters folders); one, or a list")

    @field_validator("paths", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [str(value)] if isinstance(value, str | Path) else value

    def files(self, *suffixes: str) -> list[Path]:
        """The files that `paths` name, each once: patterns in their order, the matches of a pattern sorted.

        A folder stands for the files with one of `suffixes` anywhere under it. Raises DataError for a pattern without
        a match.
        """
        found: dict[Path, None] = {}
        for pattern in self.paths:
            root = Path(pattern).expanduser()
            if root.is_dir():
                matches = [p for p in root.rglob("*") if p.is_file() and p.name.endswith(suffixes or ("",))]
            else:
                matches = [p for p in map(Path, glob.glob(str(root), recursive=True)) if p.is_file()]
            if root.is_file():
                matches = [root]
            if not matches:
                where = f"under {Path.cwd()}" if not root.is_absolute() else "there"
                raise DataError(f"data source '{pattern}': no such file {where}; check the path or the glob")
            found.update(dict.fromkeys(sorted(matches)))
        return list(found)


def decoded(data: bytes, path: Path, offset: int) -> str:
    """`data`, found at byte `offset` of the file, as text. Raises DataError naming the line that is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        bad = data[error.start]
        raise DataError(
            f"{path}:{line_of(path, at)}: byte 0x{bad:02x} at offset {at} is not UTF-8; convert the file, for example "
            f"with `iconv -f latin1 -t utf-8`"
        ) from error


class TextConfig(FilesConfig):
    """Plain text: one document per file, or one per stretch between separators."""

    kind: Literal["text"] = "text"
    separator: str | None = Field(None, min_length=1, description="what stands between documents; none: a file is one")

    def pieces(self) -> list[Piece]:
        files = [(str(path), path.stat().st_size) for path in self.files(".txt", ".md")]
        # A separator that can overlap itself ("\n\n") is only found reliably from the start of the file.
        alone = self.separator and not any(
            self.separator.startswith(self.separator[i:]) for i in range(1, len(self.separator))
        )
        step = PIECE_BYTES if alone else None
        return [Piece(path, a, b, b - a) for path, size in files for a, b in cut(size, step)]

    def read(self, piece: Piece) -> Iterator[str]:
        path = Path(piece.path)
        if self.separator is None:
            with readable(path):
                data = path.read_bytes()
            if data:
                yield decoded(data, path, 0)
            return
        for offset, record in records(path, self.separator.encode(), piece.start, piece.stop):
            if record:
                yield decoded(record, path, offset)


class JsonlConfig(FilesConfig):
    """One JSON object per line; .jsonl, .jsonl.gz or .jsonl.zst."""

    kind: Literal["jsonl"] = "jsonl"
    field: str = Field("text", description="the key that holds the document")

    def pieces(self) -> list[Piece]:
        pieces = []
        for path in self.files(".jsonl", ".jsonl.gz", ".jsonl.zst"):
            size, whole = path.stat().st_size, path.suffix in (".gz", ".zst")
            cuts = [(0, None)] if whole else cut(size, PIECE_BYTES)
            pieces += [Piece(str(path), a, b, size if b is None else b - a) for a, b in cuts]
        return pieces

    def read(self, piece: Piece) -> Iterator[str]:
        path = Path(piece.path)
        for number, (offset, line) in enumerate(records(path, b"\n", piece.start, piece.stop, opener=opened)):
            if line.strip():
                text = self._text(line, path, offset, number)
                if text:
                    yield text

    def _text(self, line: bytes, path: Path, offset: int, number: int) -> str:
        def where() -> str:
            return f"{path}:{number + 1 if path.suffix in ('.gz', '.zst') else line_of(path, offset)}"

        try:
            row = loads(line)
        except (JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{where()}: not a JSON line: {error}") from error
        if not isinstance(row, dict) or self.field not in row:
            keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{where()}: no field '{self.field}'; the line has: {keys}. Set `field` to one of them")
        if not isinstance(row[self.field], str):
            raise DataError(f"{where()}: field '{self.field}' is {type(row[self.field]).__name__}, expected a string")
        return valid_unicode(row[self.field], where)


def valid_unicode(text: str, where: Any) -> str:
    """`text`, unless it holds half a surrogate pair (JSON can write one; UTF-8 cannot). Raises DataError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where()}: half a surrogate pair at character {error.start}; no valid text") from error
    return text


class PythonStdlibConfig(SourceConfig):
    """The source text of this machine's Python standard library: about 30 MB that every machine with Python has."""

    kind: Literal["python_stdlib"] = "python_stdlib"
    tests: bool = Field(True, description="whether to keep the test folders (more than half of the text)")

    def pieces(self) -> list[Piece]:
        root = Path(sysconfig.get_path("stdlib"))
        skipped = NOT_LIBRARY | (set() if self.tests else TEST_FOLDERS)
        files = [p for p in root.rglob("*.py") if p.is_file() and not skipped & set(p.relative_to(root).parts[:-1])]
        if not files:
            raise DataError(f"{root}: no *.py file; this Python ships its library without sources, use another source")
        return [Piece(str(p), size=p.stat().st_size) for p in sorted(files, key=lambda p: p.relative_to(root).parts)]

    def read(self, piece: Piece) -> Iterator[str]:
        try:
            with readable(piece.path):
                text = Path(piece.path).read_bytes().decode()
        except UnicodeDecodeError:
            return  # some test files are in another encoding on purpose
        if text:
            yield text


class ParquetConfig(FilesConfig):
    """A string column of Parquet files."""

    kind: Literal["parquet"] = "parquet"
    column: str = Field("text", description="the column that holds the document")

    def pieces(self) -> list[Piece]:
        parquet = extra("pyarrow.parquet")
        pieces = []
        for path in self.files(".parquet"):
            with readable(path, extra("pyarrow").ArrowException):
                metadata = parquet.read_metadata(path)
            groups = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
            pieces += [Piece(str(path), group, group + 1, size) for group, size in enumerate(groups)]
        return pieces

    def read(self, piece: Piece) -> Iterator[str]:
        parquet = extra("pyarrow.parquet")
        with readable(piece.path, extra("pyarrow").ArrowException), parquet.ParquetFile(piece.path) as file:
            names = file.schema_arrow.names
            if self.column not in names:
                raise DataError(f"{piece.path}: no column '{self.column}'; it has: {', '.join(names)}. Set `column`")
            number = 0
            for batch in file.iter_batches(batch_size=1024, row_groups=[piece.start], columns=[self.column]):
                for value in batch.column(0).to_pylist():
                    where = f"{piece.path}: row {number} of row group {piece.start}, column '{self.column}'"
                    yield from checked_text(value, where)
                    number += 1


class HuggingFaceConfig(SourceConfig):
    """A dataset of the `datasets` library: a name on the hub, a local folder of data files, or one saved to disk."""

    kind: Literal["huggingface"] = "huggingface"
    path: str = Field(description="name on the hub, or a local folder")
    name: str | None = Field(None, description="the dataset's configuration, where it has several")
    split: str = Field("train", description="which split to read")
    field: str = Field("text", description="the column that holds the document")
    revision: str | None = Field(
        None, description="the commit to read; pin it, so that the data cannot change under you"
    )
    streaming: bool = Field(False, description="read over the network, without a copy on disk")

    def pieces(self) -> list[Piece]:
        data = self._load()
        if self.streaming:
            return [Piece(self.path, shard, shard + 1) for shard in range(data.num_shards)]
        rows, size = len(data), data.data.nbytes if data.data is not None else 0
        step = max(1, rows * PIECE_BYTES // max(size, 1))
        return [Piece(self.path, a, b, size * (b - a) // max(rows, 1)) for a, b in cut(rows, step)]

    def read(self, piece: Piece) -> Iterator[str]:
        data = self._load()
        if self.streaming:
            part = data.shard(num_shards=data.num_shards, index=piece.start)
        else:
            part = data.select(range(piece.start, piece.stop if piece.stop is not None else len(data)))
        for number, row in enumerate(part):
            if self.field not in row:
                keys = ", ".join(sorted(row))
                raise DataError(f"dataset {self.path}: no column '{self.field}'; it has: {keys}. Set `field`")
            yield from checked_text(row[self.field], f"dataset {self.path}: row {piece.start + number}, '{self.field}'")

    def signature(self) -> Any:
        config = self.model_dump(mode="json", exclude={"weight"})
        root = Path(self.path).expanduser()
        files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file()]
        return {"config": config, "files": files if root.is_dir() else []}

    def _load(self) -> Any:
        datasets = extra("datasets")
        folder = Path(self.path).expanduser()
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                data = datasets.load_from_disk(str(folder))
                return data[self.split] if isinstance(data, dict) else data
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else self.path,
                self.name,
                split=self.split,
                streaming=self.streaming,
                revision=self.revision,
            )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"dataset {self.path} (split '{self.split}'): cannot be loaded: {error}") from error


def checked_text(value: Any, where: str) -> Iterator[str]:
    """`value` if it is a non-empty string. Raises DataError if it is no string."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {type(value).__name__}, expected a string")
    if value:
        yield value
