"""A model and its tokenizer from what a run leaves behind: its final weights, or its latest checkpoint."""

from pathlib import Path

import torch

from treadle.config import read_yaml, resolve
from treadle.config.include import names
from treadle.config.load import import_all
from treadle.data.tokenizer import Tokenizer
from treadle.errors import CheckpointError
from treadle.families import checkpoint as published
from treadle.nn.store import SPEC_FILE, build_meta, cast, load_model
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import WeightsReader, weight_files
from treadle.train.checkpoint import CHECKPOINTS, Checkpointer
from treadle.train.config import CheckpointConfig

FINAL, TOKENIZER = "final", "tokenizer"


def load(
    path: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model in evaluation mode, and its tokenizer.

    path: a run folder, its `final` folder, any folder with `model.yaml`, `model.safetensors` and `tokenizer/`, or a
        Hugging Face checkpoint.
    device: None is the GPU if there is one. dtype: of weights and computation; None is bf16 on a GPU, fp32 on a CPU.
    Raises CheckpointError when there is nothing to load.
    """
    path = Path(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    for recipe in (path / "config.yaml", path.absolute().parent / "config.yaml"):  # of a run, or of the run it is in
        if recipe.is_file():  # a run may be made of the user's own blocks
            import_all(names(read_yaml(recipe).get("imports"), "imports", str(recipe)), str(recipe))
            break
    for folder in (path, path / FINAL):
        if (folder / SPEC_FILE).is_file():
            return load_model(folder, device=device, dtype=dtype), Tokenizer.load(folder / TOKENIZER)
    if published.is_published(path):
        return published.load(path, device=device, dtype=dtype), Tokenizer.load(path)
    checkpoints = Checkpointer(path / CHECKPOINTS, CheckpointConfig())
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(
            f"{path}: holds neither {FINAL}/{SPEC_FILE}, nor a config.json, nor a complete checkpoint"
        )
    spec = checkpoints.facts(steps[-1])["model"]  # not the recipe's, which may leave the vocabulary to the tokenizer
    model = build_meta(resolve(TransformerConfig, spec)).to_empty(device=device)
    checkpoints.load_tensors({"model": dict(model.named_parameters())}, steps[-1])
    cast(model, dtype)
    return model.eval(), Tokenizer.load(path / TOKENIZER)


def stored_dtype(path: Path | str) -> torch.dtype:
    """The dtype in which `load` would find the weights: float32 of a checkpoint, of a model folder what it holds."""
    for folder in (Path(path), Path(path) / FINAL):
        if weight_files(folder):
            reader = WeightsReader(folder)
            return reader.dtype(next(iter(reader)))
    return torch.float32
