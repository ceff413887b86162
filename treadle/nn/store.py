"""A model on disk by itself: `model.yaml` says what it is, `model.safetensors` or its shards hold its weights."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from treadle.config import resolve, to_yaml
from treadle.errors import CheckpointError
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import SHARD_BYTES, WeightsReader, WeightsWriter

SPEC_FILE, FINAL = "model.yaml", "final"  # the second: where a run's folder has its model
METADATA = {"format": "treadle-model-1"}


def save_model(
    model: Transformer,
    folder: Path | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    parameters: Iterable[tuple[str, Tensor]] | None = None,
) -> Path:
    """Write the spec and the weights, in their own dtype; a shared weight is written once. Returns the folder.

    parameters: by name, one at a time, where the model's own are not whole.
    """
    folder = Path(folder)
    with WeightsWriter(folder, shard_bytes=shard_bytes, metadata=METADATA) as writer:
        for name, parameter in model.named_parameters() if parameters is None else parameters:
            writer.add(name, parameter)
        writer.beside[SPEC_FILE] = to_yaml(model.config)
    return folder


def load_model(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a folder that `save_model` wrote, in evaluation mode. dtype: of the weights; None is float32.

    Raises CheckpointError listing every tensor that is missing, left over or of another shape.
    """
    model = build_meta(resolve(TransformerConfig, Path(folder) / SPEC_FILE))
    reader = open_weights(folder, model)
    allocate(model, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor(name))
    return model.eval()


def open_weights(folder: Path | str, model: Transformer) -> WeightsReader:
    """The weights of a folder, which must be the model's. Raises CheckpointError as `load_model` does."""
    reader = WeightsReader(folder)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _compare(reader.path, expected, {name: reader.shape(name) for name in reader})
    return reader


def model_folder(path: Path) -> Path | None:
    """Where the `model.yaml` and the weights of a folder are: in itself or in `final`; None if there are none."""
    return next((folder for folder in (path, path / FINAL) if (folder / SPEC_FILE).is_file()), None)


def build_meta(config: TransformerConfig) -> Transformer:
    """The module without memory, to be filled later."""
    with torch.device("meta"):
        model: Transformer = config.build()
    return model


def allocate(model: Transformer, *, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Give a model of `build_meta` its memory, in the dtype of weights and computation (None: float32)."""
    if dtype is not None:
        cast(model, dtype)
    model.to_empty(device=device)


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model itself, its weights and computation in a dtype, but for parameters that a block keeps in float32."""
    kept = [(parameter, parameter.data) for _, parameter in wide_parameters(model)]
    model.to(dtype).dtype = dtype
    for parameter, data in kept:
        parameter.data = data.to(torch.promote_types(dtype, torch.float32))
    return model


def wide_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters, with their names, that their blocks name in `float32`: no narrower dtype is to round them."""
    for path, module in model.named_modules():
        for name in getattr(module, "float32", ()):
            if (parameter := getattr(module, name)) is not None:
                yield f"{path}.{name}".removeprefix("."), parameter


def _compare(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"left over {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name}: {found[name]} in the file, {shape} in the model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit {SPEC_FILE}:\n  " + "\n  ".join(problems))
