"""Recipe files on disk: `include:` at any level, merged key by key, and `imports:` collected from all of them."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treadle.config import yaml_io
from treadle.config.words import quote
from treadle.errors import ConfigError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file as a mapping, every `include:` merged in and every `imports:` collected at the top, files absolute.

    Raises ConfigError with file and line for what is not YAML, for duplicate keys and for files that are not there.
    """
    imports: list[str] = []
    data = _read(Path(path), (), imports)
    return {**data, "imports": imports} if imports or "imports" in data else data


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, key by key at every level; `over` wins. Lists, and mappings of another `kind`, are replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        same = isinstance(below, Mapping) and isinstance(value, Mapping) and not _kinds_differ(below, value)
        merged[key] = merge(below, value) if same else value  # type: ignore[arg-type]
    return merged


def _kinds_differ(base: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return "kind" in base and "kind" in over and base["kind"] != over["kind"]


def _read(path: Path, including: tuple[Path, ...], imports: list[str]) -> dict[str, Any]:
    """One file with its includes; `including` are the files on the way here, `imports` grows in place."""
    data = yaml_io.parse(yaml_io.read_text(path), str(path))
    if data is None:
        raise ConfigError(f"{path}: the file is empty; expected a mapping of keys")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {quote(data)}")
    asked = names(data.get("imports"), "imports", path)
    if including:
        data.pop("imports", None)  # an included file may land anywhere; imports belong to the top
    imports += [name for name in dict.fromkeys(absolute(asked, path.parent)) if name not in imports]
    return _expand(data, path, (*including, path), imports)


def _expand(node: Any, path: Path, including: tuple[Path, ...], imports: list[str]) -> Any:
    if isinstance(node, list):
        return [_expand(item, path, including, imports) for item in node]
    if not isinstance(node, dict):
        return node
    base: dict[str, Any] = {}
    for name in names(node.get("include"), "include", path):
        base = merge(base, _read(_find(name, path, including), including, imports))
    own = {key: _expand(value, path, including, imports) for key, value in node.items() if key != "include"}
    return merge(base, own)


def names(value: Any, key: str, origin: object) -> list[str]:
    """One name or a list of names, as a list; ConfigError for anything else."""
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"{origin}: {key}: expected a name or a list of names, got {quote(value)}")
    return list(listed)


def absolute(imports: list[str], folder: Path) -> list[str]:
    """Files relative to the one that asks, as absolute paths, so that a saved configuration still finds them."""
    return [str((folder / Path(name).expanduser()).resolve()) if name.endswith(".py") else name for name in imports]


def _find(name: str, path: Path, including: tuple[Path, ...]) -> Path:
    target = path.parent / Path(name).expanduser()
    if not target.is_file():
        close = difflib.get_close_matches(target.name, [file.name for file in target.parent.glob("*")], n=1)
        hint = f" Did you mean '{Path(name).with_name(close[0])}'?" if close else ""
        raise ConfigError(f"{path}: include: no file '{name}' relative to {path.parent or '.'}.{hint}")
    if target.resolve() in [file.resolve() for file in including]:
        raise ConfigError(f"{path}: include cycle: {' -> '.join(map(str, (*including, target)))}")
    return target
