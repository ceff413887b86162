"""A model and its tokenizer from what a run leaves behind: its final weights, or its latest checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch

from treadle.config import read_yaml, resolve
from treadle.config.include import names
from treadle.config.load import import_all
from treadle.data.tokenizer import Tokenizer
from treadle.errors import CheckpointError
from treadle.families import checkpoint as published
from treadle.nn.store import FINAL, SPEC_FILE, build_meta, cast, load_model, model_folder
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.train.checkpoint import CHECKPOINTS, Checkpointer
from treadle.train.config import CheckpointConfig

TOKENIZER = "tokenizer"


def load(
    path: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    imports: Sequence[str] = (),
) -> tuple[Transformer, Tokenizer | None]:
    """The model in evaluation mode, and its tokenizer; None if it has none.

    path: a run folder, its `final` folder, any folder with `model.yaml`, `model.safetensors` and `tokenizer/`, or a
        Hugging Face checkpoint.
    device: None is the GPU if there is one. dtype: of weights and computation; None is bf16 on a GPU, fp32 on a CPU.
    imports: the user's own Python files or modules, with blocks or families, that the folder does not name itself.
    Raises CheckpointError when there is nothing to load.
    """
    path = Path(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    import_blocks(path, imports)
    if (folder := model_folder(path)) is not None:
        model = load_model(folder, device=device, dtype=dtype)
    elif published.is_published(path):
        model = published.load(path, device=device, dtype=dtype)
    else:
        model = _load_checkpoint(path, device, dtype)
    place = tokenizer_folder(path)
    return model, Tokenizer.load(place) if (place / "tokenizer.json").is_file() else None


def import_blocks(path: Path, imports: Sequence[str] = ()) -> None:
    """Import the given files and modules, and those of the run that a folder is, or is in."""
    import_all(imports, "--import")
    for recipe in (path / "config.yaml", path.absolute().parent / "config.yaml"):
        if recipe.is_file():
            import_all(names(read_yaml(recipe).get("imports"), "imports", str(recipe)), str(recipe))
            break


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer's files of a folder are, if it has a tokenizer."""
    folder = model_folder(path)
    return path if folder is None and published.is_published(path) else (folder or path) / TOKENIZER


def _load_checkpoint(path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model of a run's latest checkpoint."""
    checkpoints = Checkpointer(path / CHECKPOINTS, CheckpointConfig())
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(
            f"{path}: holds neither {FINAL}/{SPEC_FILE}, nor a config.json, nor a complete checkpoint"
        )
    spec = checkpoints.facts(steps[-1])["model"]  # not the recipe's, which may leave the vocabulary to the tokenizer
    model = build_meta(resolve(TransformerConfig, spec)).to_empty(device=device)
    checkpoints.load_tensors({"model": dict(model.named_parameters())}, steps[-1])
    return cast(model, dtype).eval()
