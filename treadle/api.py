"""The Python API: `import treadle`, then `build`, `run`, `load`, `generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from treadle import recipes
from treadle.config import resolve
from treadle.data.tokenizer import Tokenizer
from treadle.errors import ConfigError
from treadle.inference.load import load as load_folder
from treadle.inference.text import generate, stream
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel.mesh import find_device
from treadle.tracking.runs import Runs

__all__ = ["build", "find_run", "generate", "load", "run", "stream"]


def build(
    spec: Path | str | dict[str, Any], overrides: Sequence[str] = (), *, seed: int = 0, device: str = "cpu"
) -> Transformer:
    """A freshly initialised model from a spec: a YAML file or a mapping with `dim`, `vocab_size`, `layers`, ...

    A recipe works too: its `model` section is taken. Raises ConfigError naming the key, the value and the fix.
    """
    source: Any = spec
    if not isinstance(spec, dict):
        from treadle.config import read_yaml

        source = read_yaml(spec)
    if "model" in source:
        source = {**source["model"], "imports": source.get("imports")}
    config = resolve(TransformerConfig, source, overrides)
    if config.vocab_size is None:
        raise ConfigError("vocab_size: not set, and there is no tokenizer here to take it from; give a number")
    with torch.device(device):
        model: Transformer = config.build()
    return model.initialise(seed)


def run(
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    resume: str | Path | None = None,
    root: Path | str = "runs",
) -> Path:
    """Run a recipe, or go on with a run (`resume`: its folder, id, a prefix of the id, or "latest" under `root`).

    Returns the run folder.
    """
    folder: Path | None = None
    if resume is not None:
        folder = find_run(resume, root)
        recipe = folder / "config.yaml"
    if recipe is None:
        raise ValueError("give a recipe, or a run to resume")
    config = recipes.load(recipe, overrides, preset)
    return recipes.main(config, resume=folder)


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    root: Path | str = "runs",
    imports: Sequence[str] = (),
) -> tuple[Transformer, Tokenizer | None]:
    """Model and tokenizer (None: it has none) of a run (folder, id, prefix, "latest") or of a model folder.

    imports: Python files or modules with blocks or families of your own that the folder does not name itself.
    """
    return load_folder(find_model(path, root), device=find_device(device), dtype=dtype, imports=imports)


def find_model(reference: str | Path, root: Path | str = "runs") -> Path:
    """The folder of a model or of a run (folder, id, prefix, "latest"). Raises as `find_run` does."""
    return Path(reference) if Path(reference).is_dir() else find_run(reference, root)


def find_run(reference: str | Path, root: Path | str = "runs") -> Path:
    """The folder of a run. Raises RunError with the nearest name if there is none."""
    return Runs(root).find(str(reference)).folder
