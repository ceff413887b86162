"""From a recipe to a validated configuration: presets, the user's own modules, overrides, validation."""

import importlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from treadle.config import overrides as override
from treadle.config.base import Config, nearest
from treadle.config.explain import explain
from treadle.config.include import absolute, merge, names, read_yaml
from treadle.config.schema import plain
from treadle.config.words import quote
from treadle.errors import ConfigError, TreadleError

T = TypeVar("T", bound=Config)


def resolve(
    schema: type[T],
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    preset: str | None = None,
    device: str = "cpu",
) -> T:
    """The validated configuration that a recipe (a file, or a mapping) describes.

    Order: the file with its includes, then the preset, then the overrides (`a.b=value`, see `config/overrides.py`).
    The preset is the one named by the argument, else by an override `preset=name`, else by the recipe; if nobody
    names one, a preset called after the `device` type ("cpu", "cuda") is applied where there is one. `preset=null`
    means none. Raises one ConfigError that lists every problem.
    """
    origin = "recipe" if isinstance(source, Mapping) else str(source)
    raw = plain(source) if isinstance(source, Mapping) else read_yaml(source)
    assignments = [override.parse(text) for text in overrides]
    for assignment in assignments:
        if assignment.path == ("preset",):
            raw["preset"] = assignment.value
        elif assignment.path[0] == "imports":  # before the others, which may name what it defines
            raw = override.apply(raw, schema, assignment)
            raw["imports"] = absolute(names(raw["imports"], "imports", "override"), Path())
    raw = _apply_preset(raw, {"preset": preset} if preset is not None else raw, device, origin)
    import_all(names(raw.get("imports"), "imports", origin), origin)
    if "imports" not in schema.model_fields:
        raw.pop("imports", None)
    for assignment in assignments:
        if assignment.path[0] not in ("preset", "imports"):
            raw = override.apply(raw, schema, assignment)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise explain(error, schema, raw, None if isinstance(source, Mapping) else origin) from None


def _apply_preset(raw: dict[str, Any], choice: Mapping[str, Any], device: str, origin: str) -> dict[str, Any]:
    """The recipe with the chosen preset merged over it, and the keys `preset` and `presets` gone."""
    presets = raw.get("presets") or {}
    if not isinstance(presets, Mapping):
        raise ConfigError(f"{origin}: presets: expected a mapping of names to partial recipes, got {quote(presets)}")
    body = {key: value for key, value in raw.items() if key not in ("preset", "presets")}
    name = choice.get("preset", device if device in presets else None)
    if name is None:
        return body
    if name not in presets:
        known = nearest(str(name), map(str, presets)) or " This recipe has no presets."
        raise ConfigError(f"{origin}: preset: unknown preset {quote(name)}.{known}")
    partial = presets[name] or {}
    if not isinstance(partial, Mapping):
        raise ConfigError(f"{origin}: presets.{name}: expected a partial recipe, got {quote(partial)}")
    return merge(body, partial)


def import_all(modules: Sequence[str], origin: str) -> None:
    """Import the user's Python files and modules, once each, so that the blocks they define register themselves."""
    for name in modules:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                importlib.import_module(name)
        except TreadleError as error:
            raise ConfigError(f"{origin}: imports: {name}: {error}") from error
        except Exception as error:
            raise ConfigError(f"{origin}: imports: {_where(name, error)}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    path = path.expanduser().resolve()
    name = f"treadle_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # two folders may both hold a blocks.py
    copy = f"treadle_user_{zlib.crc32(path.read_bytes()):08x}"  # and a model folder holds copies of its blocks' files
    if name in sys.modules or copy in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = sys.modules[copy] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name], sys.modules[copy]
        raise


def _where(name: str, error: Exception) -> str:
    """`file:line` of the user's own line that failed, if the traceback reaches one."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(name)]
    return f"{name}:{lines[-1]}" if lines else name
