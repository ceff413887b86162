"""Weights that a run starts from: of a published checkpoint, of a model folder, or of another run's checkpoint.

Each process reads what it needs of them, tensor by tensor, so that no layout ever needs the whole model in one place.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from treadle.config import diff, resolve, to_dict
from treadle.errors import CheckpointError
from treadle.families import checkpoint as published
from treadle.families.quantised import dequantised
from treadle.families.tensors import match
from treadle.nn.store import SPEC_FILE, build_meta, model_folder, open_weights
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import WeightsReader
from treadle.parallel.shards import checkpointed, copy_whole, parts_of
from treadle.train.checkpoint import CHECKPOINTS, FACTS_FILE, Checkpointer
from treadle.train.config import CheckpointConfig

logger = logging.getLogger(__name__)

BLOCK, BLOCKS = 1 << 16, 64  # what a fingerprint reads of a file: so many bytes, at so many places


class Checkpoint(NamedTuple):
    """A step of a run: the folder with all of its checkpoints, and the step."""

    folder: Path
    step: int

    def facts(self) -> dict[str, object]:
        return Checkpointer(self.folder, CheckpointConfig()).facts(self.step)


def find_checkpoint(path: Path) -> Checkpoint:
    """A run's latest checkpoint, or the one that the path is. Raises CheckpointError."""
    if (path / FACTS_FILE).is_file():
        return Checkpoint(path.parent, int(path.name.removeprefix("step-")))
    steps = Checkpointer(path / CHECKPOINTS, CheckpointConfig()).steps()
    if not steps:
        what = (
            "holds neither model.yaml, nor a config.json, nor a complete checkpoint" if path.is_dir() else "no folder"
        )
        raise CheckpointError(f"weights: {path}: {what}")
    return Checkpoint(path / CHECKPOINTS, steps[-1])


def spec_of(path: Path) -> TransformerConfig:
    """The model that a folder of weights is of. Raises CheckpointError."""
    if (folder := model_folder(path)) is not None:
        return resolve(TransformerConfig, folder / SPEC_FILE)
    if published.is_published(path):
        return published.read_spec(path)[1]
    return resolve(TransformerConfig, find_checkpoint(path).facts()["model"])  # type: ignore[arg-type]


def open_tensors(path: Path, spec: TransformerConfig) -> Callable[[str], Tensor] | None:
    """What gives each parameter of a model by name, whole and on the CPU; None for a checkpoint in pieces.

    Raises CheckpointError that lists every tensor that is missing, left over or of another shape.
    """
    model = build_meta(spec)
    if (folder := model_folder(path)) is not None:
        return open_weights(folder, model).tensor
    if not published.is_published(path):
        return None
    family, _ = published.read_spec(path)
    reader = dequantised(WeightsReader(path), published.read_config(path))
    parts, parameters = match(family, model, reader), dict(model.named_parameters())

    def tensor(name: str) -> Tensor:
        values = torch.empty(parameters[name].shape, dtype=reader.dtype(parts[name][0].source))
        published.fill(values, parts[name], reader)
        return values

    return tensor


@torch.no_grad()
def load_weights(model: Transformer, path: Path) -> None:
    """Fill the parameters of a model, of which this process may hold a part, in any layout; those that a file cannot
    have (adapters, further predictions of a published model) stay. All processes call it.

    Names and shapes have to be the model's. What else differs (a window, a scaling of RoPE) is logged: it may be meant.
    Raises CheckpointError.
    """
    changes = diff(*(_architecture(spec) for spec in (spec_of(path), model.config)))
    if changes:
        shown = "; ".join(f"model.{key}: {old} -> {new}" for key, old, new in changes)
        logger.warning("%s is of another architecture (%s)", path, shown)
    parts, here = parts_of(model), dict(base_parameters(model))
    read = open_tensors(path, model.config)
    if read is None:
        folder, step = find_checkpoint(path)
        tensors = {name: checkpointed(parameter.detach(), parts.get(name, ())) for name, parameter in here.items()}
        Checkpointer(folder, CheckpointConfig()).load_tensors({"model": tensors}, step)
        return
    further = model_folder(path) is None
    for name, parameter in here.items():
        if not (further and name.startswith("multi_token.")):
            copy_whole(parameter, read(name), parts.get(name, ()))


def base_parameters(model: Transformer) -> Iterator[tuple[str, nn.Parameter]]:
    """Those that the model has by itself, without what was attached to it, as far as they are here."""
    own = {name for name, _ in build_meta(model.config).named_parameters()}
    return ((name, parameter) for name, parameter in model.named_parameters() if name in own)


def fingerprint(path: Path) -> str:
    """What tells weights from others: of each file its size, and bytes from all over it. Fast for any size.

    Of a folder that is trained on in place it changes; of a copy it does not.
    """
    folder = model_folder(path) or path
    if not (folder / SPEC_FILE).is_file() and not published.is_published(folder):
        checkpoint = find_checkpoint(path)
        folder = Checkpointer(checkpoint.folder, CheckpointConfig()).path(checkpoint.step)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")]):
        size = file.stat().st_size
        digest.update(f"{size}/".encode())
        with file.open("rb") as opened:
            for place in range(BLOCKS):
                opened.seek(max(0, size - BLOCK) * place // (BLOCKS - 1))
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()


def _architecture(spec: TransformerConfig) -> dict[str, object]:
    return {key: value for key, value in to_dict(spec).items() if key not in ("init", "vocab_size")}
