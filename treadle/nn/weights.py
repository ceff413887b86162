"""Named tensors in a folder of safetensors files: one file, or shards with an index, as Hugging Face lays them out.

Both directions stream: a writer holds one shard in memory, a reader one tensor.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from treadle.errors import CheckpointError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
SHARD_BYTES = 5 << 30


class WeightsWriter:
    """Collects tensors and writes them in shards of at most `shard_bytes` (a larger tensor has one to itself).

    A context manager. The files take their names when it closes without an error, and those that were there before go;
    until then the folder's own weights stay, and the texts that describe them (`beside`).
    """

    def __init__(
        self, folder: Path | str, *, shard_bytes: int = SHARD_BYTES, metadata: Mapping[str, str] | None = None
    ):
        self.folder, self.shard_bytes, self.metadata = Path(folder), shard_bytes, dict(metadata or {})
        self.shard: dict[str, Tensor] = {}
        self.bytes = self.total_bytes = 0
        self.written: list[tuple[Path, list[str]]] = []
        self.beside: dict[
            str, str
        ] = {}  # texts by file name, written last: weights are never described by others' facts

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.shard and self.bytes + size > self.shard_bytes:
            self._flush()
        self.shard[name] = tensor.detach().cpu().contiguous()
        self.bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        path = self.folder / f".weights-{len(self.written):05d}.partial"
        self.written.append((path, list(self.shard)))
        try:
            save_file(self.shard, path, metadata=self.metadata)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: the weights could not be written: {error}") from error
        self.shard, self.bytes = {}, 0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._publish()
        finally:
            for path, _ in self.written:
                path.unlink(missing_ok=True)

    def _publish(self) -> None:
        count = len(self.written)
        names = (
            [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        old = {self.folder / WEIGHTS_FILE, *self.folder.glob(SHARDS), self.folder / INDEX_FILE}
        for (path, _), name in zip(self.written, names, strict=True):
            os.replace(path, self.folder / name)
        if count > 1:
            places = {tensor: name for (_, shard), name in zip(self.written, names, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": places}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
            old.discard(self.folder / INDEX_FILE)
        for path in old - {self.folder / name for name in names}:
            path.unlink(missing_ok=True)
        for name, text in self.beside.items():
            (self.folder / name).write_text(text)


class WeightsReader:
    """The tensors of a folder (or of one file), by name; nothing is read before it is asked for.

    metadata: of the first file. Raises CheckpointError for a folder without safetensors: pickled weights are refused,
    since reading one runs whatever code it holds.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        files = [self.path] if self.path.is_file() else weight_files(self.path)
        if not files:
            raise CheckpointError(_no_weights(self.path))
        self.files: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        for file in reversed(files):
            try:
                opened = safe_open(file, framework="pt")
                self.files |= dict.fromkeys(opened.keys(), opened)
                self.metadata = opened.metadata() or {}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of floats and the like; int for others."""
        return _DTYPES.get(self.files[name].get_slice(name).get_dtype(), torch.int64)

    def tensor(self, name: str) -> Tensor:
        """On the CPU, in its own dtype."""
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those of the index if there is one, else the one file, or its shards.

    Raises CheckpointError for an index that cannot be read, or whose files are not there.
    """
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if not index.is_file():
        return [single] if single.is_file() else sorted(folder.glob(SHARDS))
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is no index of shards, with a weight_map: {error!r}") from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: tensors of {', '.join(missing)} are not there; is the download complete?")
    return [folder / name for name in names]


def _no_weights(path: Path) -> str:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
    if not pickled:
        return f"{path}: holds neither {WEIGHTS_FILE} nor shards of it"
    return (
        f"{path}: {pickled[0]} is a pickle, and reading a pickle runs whatever code it holds; Treadle reads "
        "safetensors only. If you trust the file, load the model with transformers and write it with `save_pretrained`"
    )
