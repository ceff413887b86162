"""A model on disk by itself: `model.yaml` says what it is, `model.safetensors` holds its weights by name."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from treadle.config import resolve, to_yaml
from treadle.errors import CheckpointError
from treadle.nn.transformer import Transformer, TransformerConfig

SPEC_FILE, WEIGHTS_FILE = "model.yaml", "model.safetensors"


def save_model(model: Transformer, folder: Path | str) -> Path:
    """Write the spec and the weights, in their own dtype; a shared weight is written once. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    temporary = folder / f".{WEIGHTS_FILE}.partial"
    try:
        save_file(weights, temporary, metadata={"format": "treadle-model-1"})
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: could not be written: {error}") from error
    (folder / SPEC_FILE).write_text(to_yaml(model.config))
    os.replace(temporary, folder / WEIGHTS_FILE)
    return folder


def load_model(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a folder that `save_model` wrote, in evaluation mode. dtype: of the weights; None keeps them.

    Raises CheckpointError listing every tensor that is missing, left over or of another shape.
    """
    folder = Path(folder)
    path = folder / WEIGHTS_FILE
    model = build_meta(resolve(TransformerConfig, folder / SPEC_FILE))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _compare(path, {name: tuple(p.shape) for name, p in model.named_parameters()}, found)
            model.to_empty(device=device)
            for name, parameter in model.named_parameters():
                parameter.data = file.get_tensor(name).to(dtype or parameter.dtype)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if dtype is not None:
        model.dtype = dtype
    return model.eval()


def build_meta(config: TransformerConfig) -> Transformer:
    """The module without memory, to be filled later."""
    with torch.device("meta"):
        model: Transformer = config.build()
    return model


def _compare(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"left over {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name}: {found[name]} in the file, {shape} in the model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit its {SPEC_FILE}:\n  " + "\n  ".join(problems))
