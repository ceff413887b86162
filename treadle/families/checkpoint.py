"""Published checkpoints in and out: a folder with `config.json` and safetensors, as transformers has it."""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treadle.config import resolve, to_yaml, yaml_io
from treadle.config.base import nearest
from treadle.errors import CheckpointError, ConfigError
from treadle.families.family import Family, find, fitting
from treadle.families.layouts import Piece
from treadle.families.quantised import dequantised
from treadle.families.tensors import Pieces, match, pieces
from treadle.nn.store import METADATA, SPEC_FILE, allocate, build_meta, open_weights, wide_parameters
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import SHARD_BYTES, WeightsReader, WeightsWriter

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
FAMILY = "family"  # where the weights' metadata say what they were imported from
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
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'is a file; expected its folder' if folder.exists() else 'no such folder'}")
    if not is_published(folder):
        raise CheckpointError(f"{folder}: has no {CONFIG_FILE}")
    return _mapping(folder / CONFIG_FILE)


def read_spec(folder: Path | str) -> tuple[Family, TransformerConfig]:
    """What the config.json of a folder describes. Raises CheckpointError, with the path."""
    config = read_config(folder)
    try:
        family = find(config)
        return family, family.spec(config)
    except ConfigError as error:
        raise CheckpointError(f"{Path(folder) / CONFIG_FILE}: {str(error).removeprefix('config.json: ')}") from error


class Published(NamedTuple):
    """A checkpoint that has been looked at and found to fit, none of its tensors read. parts: by our names."""

    family: Family
    spec: TransformerConfig
    model: Transformer  # without memory
    reader: WeightsReader
    parts: Pieces


def open_published(folder: Path | str) -> Published:
    """Raises CheckpointError for a family, key or tensor that does not fit."""
    family, spec = read_spec(folder)
    model = build_meta(spec)
    reader = dequantised(WeightsReader(folder), read_config(folder))
    return Published(family, spec, model, reader, match(family, model, reader))


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
    _, _, model, reader, parts = open_published(folder)
    allocate(model, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in progress(model.named_parameters(), len(parts)):
            fill(parameter, parts[name], reader)
    return model.eval()


def convert(
    folder: Path | str,
    target: Path | str,
    *,
    dtype: torch.dtype | None = None,
    imports: Sequence[str] = (),
    progress: Progress = _silent,
) -> TransformerConfig:
    """Rewrite a published checkpoint as a model folder of ours, tensor by tensor; dtype: None keeps each tensor's.

    The family is noted in the weights, for the way back. imports: modules and files that define the family or its
    blocks, imported already; files are copied, and the folder imports them when it is loaded.
    """
    family, spec, model, reader, parts = open_published(folder)
    wide = {name for name, _ in wide_parameters(model)}
    with WeightsWriter(target, metadata={**METADATA, FAMILY: family.model_type}) as writer:
        for name, parameter in progress(model.named_parameters(), len(parts)):
            found = reduce(torch.promote_types, (reader.dtype(piece.source) for piece in parts[name]))
            values = torch.empty(parameter.shape, dtype=stored_as(found, dtype, wide=name in wide))
            fill(values, parts[name], reader)
            writer.add(name, values)
        files = {Path(name).name: Path(name).expanduser() for name in imports if name.endswith(".py")}
        writer.beside |= {name: path.read_text() for name, path in files.items()}
        named = [Path(name).name if name.endswith(".py") else name for name in imports]
        writer.beside[SPEC_FILE] = (yaml_io.dump({"imports": named}) if named else "") + to_yaml(spec)
    copy_tokenizer(Path(folder), Path(target) / "tokenizer")
    return spec


def fill(values: Tensor, parts: Iterable[Piece], reader: WeightsReader) -> None:
    """Copy a parameter's pieces into place, whatever their dtype and device, with one source in memory at a time."""
    for name, pieces_of_it in groupby(parts, key=lambda piece: piece.source):
        source = reader.tensor(name)
        for piece in pieces_of_it:
            piece.place(values).copy_(piece.select(source))
        del source


def stored_as(found: torch.dtype, asked: torch.dtype | None, *, wide: bool) -> torch.dtype:
    """The dtype to write a tensor in. wide: nothing narrower than float32 was asked for; see `wide_parameters`."""
    if asked is None:
        return found
    return torch.promote_types(asked, torch.float32) if wide else asked


def save(model: Transformer, folder: Path | str, **options: Any) -> Family:
    """Write a model as `transformers.AutoModelForCausalLM.from_pretrained` reads it; see `export` for the options."""
    return export(model, dict(model.named_parameters()).__getitem__, folder, **options)


def save_folder(source: Path | str, folder: Path | str, *, family: str | None = None, **options: Any) -> Family:
    """The same for a model folder of ours, tensor by tensor; family: None prefers the one that it was imported from."""
    source = Path(source)
    model = build_meta(resolve(TransformerConfig, source / SPEC_FILE))
    reader = open_weights(source, model)
    if family is None and (origin := Family.registry.get(reader.metadata.get(FAMILY, ""))) in fitting(model.config):
        family = origin.model_type
    return export(model, reader.tensor, folder, family=family, **options)


def export(
    model: Transformer,
    tensor: Callable[[str], Tensor],
    folder: Path | str,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = _silent,
) -> Family:
    """Write the model whose parameters `tensor` gives by name. Returns the family.

    family: its model_type; None takes the first that can say all of the model. dtype: of the tensors; None keeps each
    one's. tokenizer: a folder whose files go along. Modules that predict further tokens are left out, as in inference.
    Raises ConfigError when the family, or every family, lacks a word for something in the model.
    """
    chosen = choose(model.config, family)
    config = {**chosen.config(model.config), **special_tokens(tokenizer)}
    sources: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for name, parts in pieces(chosen, model).items():
        for piece in parts:
            sources[piece.source].append((name, piece))
    wide = {name for name, _ in wide_parameters(model)}
    parameter = lru_cache(maxsize=1)(tensor)  # the experts' matrix serves many sources
    stored: list[torch.dtype] = []
    with torch.no_grad(), WeightsWriter(folder, shard_bytes=shard_bytes, metadata={"format": "pt"}) as writer:
        for source, places in progress(sources.items(), len(sources)):
            found = reduce(torch.promote_types, (parameter(name).dtype for name, _ in places))
            stored.append(stored_as(found, dtype, wide=any(name in wide for name, _ in places)))
            values = torch.empty(places[0][1].shape, dtype=stored[-1])
            for name, piece in places:
                piece.select(values).copy_(piece.place(parameter(name)))
            writer.add(source, values)
        main = str(stored[0]).removeprefix("torch.")  # the embedding's
        writer.beside[CONFIG_FILE] = json.dumps(
            {**config, "dtype": main, "torch_dtype": main}, indent=2, sort_keys=True
        )
    if tokenizer is not None:
        copy_tokenizer(tokenizer, Path(folder))
    if model.multi_token is not None:
        logger.warning("%s: multi_token is left out, as in inference: it serves training alone", folder)
    return chosen


def choose(spec: TransformerConfig, name: str | None) -> Family:
    """The family to write a spec as; see `export`."""
    if name is not None:
        if name not in Family.registry:
            raise ConfigError(f"unknown family '{name}'.{nearest(name, Family.registry)}")
        return Family.registry[name]
    able = fitting(spec)
    if not able:
        raise ConfigError(
            "no family can say all of this model; name the nearest one with --family to see what it lacks"
        )
    return able[0]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Take along the files that belong to a tokenizer, and what the model's makers say about generation."""
    for pattern in (*TOKENIZER_FILES, GENERATION_FILE):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / path.name)


def special_tokens(folder: Path | None) -> dict[str, Any]:
    """`bos_token_id` and its like, as far as the files of a tokenizer's folder tell them."""
    if folder is None:
        return {}
    named, generation = (_mapping(folder / name) for name in ("tokenizer_config.json", GENERATION_FILE))
    listed = _mapping(folder / "tokenizer.json").get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in listed}
    found: dict[str, Any] = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        name = named.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        number = generation.get(f"{key}_id", ids.get(name))
        if number is not None:
            found[f"{key}_id"] = number
    return found


def _mapping(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing if there is none. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value
