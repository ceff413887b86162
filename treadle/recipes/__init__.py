"""What a run does: one module per recipe, each with a `RecipeConfig` and a `main(config)`.

A recipe file names its module by the top-level key `recipe: pretrain`. `RecipeConfig` declares that key
(`recipe: Literal["pretrain"] = "pretrain"`) and the user's own modules (`imports: tuple[str, ...] = ()`), so that the
resolved configuration can be run again.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from treadle.config import Config, read_yaml, resolve
from treadle.config.base import nearest
from treadle.errors import ConfigError


def names() -> list[str]:
    """Every recipe there is, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def schema(name: str) -> type[Config]:
    """The `RecipeConfig` of the recipe `name`; ConfigError with the nearest name if there is none."""
    if name not in names():
        raise ConfigError(f"recipe: unknown recipe '{name}'.{nearest(name, names())}")
    return import_module(f"{__name__}.{name}").RecipeConfig


def schema_of(path: str | Path, raw: Mapping[str, Any]) -> type[Config]:
    """The schema that a recipe file asks for by its top-level `recipe:` key; `raw` is what the file holds."""
    name = raw.get("recipe")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: needs a top-level `recipe:`, one of: {', '.join(names())}")
    if name not in names():
        raise ConfigError(f"{path}: recipe: unknown recipe '{name}'.{nearest(name, names())}")
    return schema(name)


def load(path: str | Path, overrides: Sequence[str] = (), preset: str | None = None) -> Config:
    """The recipe file, resolved and validated, with the preset of the device that it will run on if none is named."""
    raw = read_yaml(path)
    return resolve(schema_of(path, raw), path, overrides, preset, device=_device_type(raw, overrides))


def _device_type(raw: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """The device that the recipe or the shell names (`device: cuda:1`), else the one that this machine has."""
    asked = [raw.get("device"), *(text.removeprefix("device=") for text in overrides if text.startswith("device="))]
    if isinstance(asked[-1], str) and asked[-1] != "auto":
        return asked[-1].partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(config: Config, *, resume: Path | None = None) -> Path:
    """Run a resolved recipe, or go on with the run in the folder `resume`; returns the run folder."""
    name = config.recipe  # type: ignore[attr-defined]
    folder: Path = import_module(f"{__name__}.{name}").main(config, resume=resume)
    return folder
