"""Published checkpoints in and out: a folder with `config.json` and safetensors, as transformers has it."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.config import to_yaml
from treadle.errors import CheckpointError, ConfigError
from treadle.families.family import Family, find, fitting
from treadle.families.layouts import Piece
from treadle.families.quantised import dequantised
from treadle.families.tensors import match, pieces
from treadle.nn.store import METADATA, SPEC_FILE, allocate, build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import SHARD_BYTES, WeightsReader, WeightsWriter

CONFIG_FILE = "config.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def _silent(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


def is_published(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint of transformers."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: Path | str) -> dict[str, Any]:
    """The config.json. Raises CheckpointError."""
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return config


def read_spec(folder: Path | str) -> tuple[Family, TransformerConfig]:
    """What the config.json of a folder describes. Raises CheckpointError, with the path."""
    config = read_config(folder)
    try:
        family = find(config)
        return family, family.spec(config)
    except ConfigError as error:
        raise CheckpointError(f"{Path(folder) / CONFIG_FILE}: {str(error).removeprefix('config.json: ')}") from error


def load(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress = _silent,
) -> Transformer:
    """The model of a published checkpoint, in evaluation mode. dtype: of weights and computation; None is float32.

    Tensors are read one at a time, straight into place, so that there are never two copies of the weights. Raises
    CheckpointError for a family, key or tensor that does not fit.
    """
    family, spec = read_spec(folder)
    model = build_meta(spec)
    reader = dequantised(WeightsReader(folder), read_config(folder))
    parts = match(family, model, reader)
    allocate(model, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in progress(model.named_parameters(), len(parts)):
            fill(parameter, parts[name], reader)
    return model.eval()


def convert(
    folder: Path | str, target: Path | str, *, dtype: torch.dtype | None = None, progress: Progress = _silent
) -> TransformerConfig:
    """Rewrite a published checkpoint as a model folder of ours, tensor by tensor; dtype: None keeps each tensor's."""
    family, spec = read_spec(folder)
    target = Path(target)
    model = build_meta(spec)
    reader = dequantised(WeightsReader(folder), read_config(folder))
    parts = match(family, model, reader)
    with WeightsWriter(target, metadata=METADATA) as writer:
        for name, parameter in progress(model.named_parameters(), len(parts)):
            stored = dtype or reader.dtype(parts[name][0].source)
            values = torch.empty(parameter.shape, dtype=stored)
            fill(values, parts[name], reader)
            writer.add(name, values)
        (target / SPEC_FILE).write_text(to_yaml(spec))
    copy_tokenizer(Path(folder), target / "tokenizer")
    return spec


def fill(values: Tensor, parts: Iterable[Piece], reader: WeightsReader) -> None:
    """Copy a parameter's pieces into place, whatever their dtype and device."""
    sources: dict[str, Tensor] = {}
    for piece in parts:
        source = sources.get(piece.source)
        if source is None:
            source = sources[piece.source] = reader.tensor(piece.source)
        piece.place(values).copy_(piece.select(source))


def save(
    model: Transformer,
    folder: Path | str,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = _silent,
) -> Family:
    """Write a model as `transformers.AutoModelForCausalLM.from_pretrained` reads it. Returns the family.

    family: its model_type; None takes the first that can say all of the model. dtype: of the tensors; None keeps them.
    Raises ConfigError when the family, or every family, lacks a word for something in the model.
    """
    chosen = choose(model.config, family)
    config = chosen.config(model.config)
    sources: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for name, parts in pieces(chosen, model).items():
        for piece in parts:
            sources[piece.source].append((name, piece))
    parameters = dict(model.named_parameters())
    folder = Path(folder)
    with torch.no_grad(), WeightsWriter(folder, shard_bytes=shard_bytes, metadata={"format": "pt"}) as writer:
        for source, parts in progress(sources.items(), len(sources)):
            values = torch.empty(parts[0][1].shape, dtype=dtype or parameters[parts[0][0]].dtype)
            for name, piece in parts:
                piece.select(values).copy_(piece.place(parameters[name]))
            writer.add(source, values)
        stored = str(dtype or next(iter(parameters.values())).dtype).removeprefix("torch.")
        write_config(folder, {**config, "dtype": stored, "torch_dtype": stored})
    return chosen


def choose(spec: TransformerConfig, name: str | None) -> Family:
    """The family to write a spec as; see `save`."""
    if name is not None:
        return find({"model_type": name})
    able = fitting(spec)
    if not able:
        raise ConfigError(
            "no family can say all of this model; name the nearest one with --family to see what it lacks"
        )
    return able[0]


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Take along the files that belong to a tokenizer, and what the model's makers say about generation."""
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / path.name)
