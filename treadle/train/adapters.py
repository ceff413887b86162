"""What fine-tuning leaves behind: `adapter.safetensors` holds what was learned, `adapter.yaml` of which weights."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from treadle.config import Config, resolve, to_yaml
from treadle.errors import CheckpointError
from treadle.families import checkpoint as published
from treadle.finetune.adapted import adapted
from treadle.finetune.attach import attach, saved_parameters, settle
from treadle.finetune.bank import add_banks
from treadle.finetune.config import FinetuneConfig
from treadle.nn.store import METADATA, SPEC_FILE, build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import WeightsReader, WeightsWriter
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import whole_parameters
from treadle.train.weights import fingerprint, load_weights, open_tensors, spec_of

logger = logging.getLogger(__name__)

ADAPTER, TENSORS_FILE, FACTS_FILE = "adapter", "adapter.safetensors", "adapter.yaml"


class AdapterFacts(Config):
    """What `adapter.yaml` says."""

    base: Path = Field(description="the weights that it belongs to")
    fingerprint: str = Field(description="of these weights")
    finetune: FinetuneConfig


def save_adapter(model: Transformer, folder: Path, facts: AdapterFacts, mesh: Mesh | None = None) -> Path:
    """Write what was learned beside a model, whole. All processes call it; the leader writes. Returns the folder."""
    mesh = mesh or Mesh()
    here = {name for name, _ in saved_parameters(model)}
    tensors = {n: t.detach().cpu().contiguous() for n, t in whole_parameters(model, mesh, only=here.__contains__)}
    if mesh.leads:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f".{TENSORS_FILE}.partial")
        os.replace(folder / f".{TENSORS_FILE}.partial", folder / TENSORS_FILE)
        (folder / FACTS_FILE).write_text(to_yaml(facts))
    mesh.wait()
    return folder


def read_facts(folder: Path) -> AdapterFacts:
    """Raises CheckpointError where there is no adapter."""
    if not (folder / FACTS_FILE).is_file() and (folder / ADAPTER / FACTS_FILE).is_file():
        folder = folder / ADAPTER
    if not (folder / FACTS_FILE).is_file():
        raise CheckpointError(f"{folder}: holds no {FACTS_FILE}; expected the folder of an adapter, or of its run")
    return resolve(AdapterFacts, folder / FACTS_FILE)


def load_adapter(model: Transformer, folder: Path) -> Transformer:
    """Put an adapter beside the weights of a whole model, in place. Raises CheckpointError where it does not fit."""
    attach(model, read_facts(folder).finetune)
    with torch.no_grad():
        for name, values in _read(model, folder).items():
            model.get_parameter(name).copy_(values)
    settle(model)
    return model


def add_adapters(model: Transformer, folders: Mapping[str, Path | str]) -> None:
    """Put several LoRA adapters beside the weights of a whole model, by name, to be chosen from for each row of a batch
    by `treadle.finetune.bank.use_adapters`. Raises CheckpointError or ConfigError for one that does not fit."""
    loaded = {}
    for name, folder in folders.items():
        loaded[name] = build_meta(model.config)
        attach(loaded[name], read_facts(Path(folder)).finetune)
        for path, values in _read(loaded[name], Path(folder)).items():
            _set(loaded[name], path, values.to(model.device))
    add_banks(model, loaded)


def merge_adapter(folder: Path, target: Path, *, base: Path | None = None) -> TransformerConfig:
    """Write the model folder of the weights with what was learned in them, tensor by tensor.

    base: where the weights are now, if elsewhere. Raises CheckpointError for other weights than it was trained on.
    """
    facts = read_facts(folder)
    where = base or facts.base
    check_base(where, facts.fingerprint)
    spec = spec_of(where)
    model, read = build_meta(spec), whole_tensors(where, spec)
    own = [name for name, _ in model.named_parameters()]
    attach(model, facts.finetune)
    learned = _read(model, folder)
    for name in [name for name in learned if name not in own]:
        _set(model, name, learned[name])
    layers: dict[str, Any] = dict(adapted(model))
    with torch.no_grad(), WeightsWriter(target, metadata=METADATA) as writer:
        for name in own:
            path, leaf = name.rpartition(".")[::2]
            values = learned[name] if name in learned else read(name)
            writer.add(name, layers[path].merged(leaf, values) if path in layers else values)
        writer.beside[SPEC_FILE] = to_yaml(spec)
    if published.is_published(where):
        published.copy_tokenizer(where, target / "tokenizer")
    return spec


def check_base(base: Path, expected: str) -> None:
    """Raises CheckpointError where weights are not those that they were."""
    found = fingerprint(base)
    if found != expected:
        raise CheckpointError(f"{base}: are other weights ({found}) than the adapter was trained on ({expected})")


def whole_tensors(path: Path, spec: TransformerConfig) -> Callable[[str], Tensor]:
    """What gives each parameter of weights by name, also of a checkpoint in pieces, which is then read as a whole."""
    read = open_tensors(path, spec)
    if read is not None:
        return read
    return dict(load_base(path).named_parameters()).__getitem__


def load_base(path: Path) -> Transformer:
    """The model of weights of any form, whole, on the CPU."""
    model = build_meta(spec_of(path)).to_empty(device="cpu")
    load_weights(model, path)
    return model.eval()


def _set(model: nn.Module, name: str, values: Tensor) -> None:
    path, leaf = name.rpartition(".")[::2]
    setattr(model.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))


def _read(model: Transformer, folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, which must be those that the model has. Raises CheckpointError."""
    file = folder / (TENSORS_FILE if (folder / TENSORS_FILE).is_file() else f"{ADAPTER}/{TENSORS_FILE}")
    reader = WeightsReader(file)
    expected = {name: tuple(parameter.shape) for name, parameter in saved_parameters(model)}
    problems = [*_problems(expected, {name: reader.shape(name) for name in reader})]
    if problems:
        raise CheckpointError(f"{file}: does not fit the model:\n  " + "\n  ".join(problems))
    return {name: reader.tensor(name) for name in expected}


def _problems(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> Iterator[str]:
    yield from (f"missing {name} {shape}" for name, shape in expected.items() if name not in found)
    yield from (f"left over {name} {shape}" for name, shape in found.items() if name not in expected)
    for name, shape in expected.items():
        if found.get(name, shape) != shape:
            yield f"{name}: {found[name]} in the file, {shape} in the model"
