"""Pydantic's validation errors in plain words: key path, what was expected, what was found, and the nearest fix."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_core.core_schema import ErrorType

from treadle.config import schema
from treadle.config.base import Config, nearest
from treadle.config.words import describe, quote
from treadle.errors import ConfigError

# `path_type` is raised by Pydantic too, but by its Python side, which keeps no list.
_BUILT_IN = frozenset({*get_args(ErrorType), "path_type"})
Path = tuple[str | int, ...]


class _Place(NamedTuple):
    """Where an error points: the key path, what the schema expects there, what holds the last key, and through which
    alternative of which union the validator got there."""

    path: Path
    annotation: Any
    holder: type[Config] | None
    branches: tuple[tuple[Path, str], ...]


def explain(error: ValidationError, config: type[Config], raw: Any, origin: str | None = None) -> ConfigError:
    """One ConfigError that lists every problem of the `raw` data, a line each."""
    found = [(_locate(config, raw, details["loc"]), details) for details in error.errors(include_url=False)]
    lines = list(dict.fromkeys(_line(place, details) for place, details in _without_idle_branches(found)))
    if len(lines) == 1:
        return ConfigError(f"{origin}: {lines[0]}" if origin else lines[0])
    heading = f"{origin}: {len(lines)} problems" if origin else f"{len(lines)} problems"
    return ConfigError("\n".join([heading, *(f"  {line}" for line in lines)]))


def dotted(path: Path) -> str:
    """`model.layers[0].mixer`"""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def _locate(config: type[Config], raw: Any, loc: tuple[str | int, ...]) -> _Place:
    """Follow Pydantic's location through schema and data, dropping the tags that it adds for unions."""
    path: Path = ()
    annotation: Any = config
    value = raw
    holder: type[Config] | None = None
    branches: list[tuple[Path, str]] = []
    tagged = False  # whether the union at this place has had its tag already
    for key in loc:
        if not tagged and len(schema.members(annotation)) > 1 and isinstance(key, str):
            branches.append((path, key))
            tagged = True
            continue
        if key == "[key]":  # Pydantic's mark for a bad dictionary key, which the path names already
            continue
        holder = schema.config_class(annotation, value)
        annotation = schema.child(annotation, value, key)
        value = _get(value, key)
        path = (*path, key)
        tagged = False
    return _Place(path, annotation, holder, tuple(branches))


def _get(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list | tuple) and isinstance(key, int) and key < len(value):
        return value[key]
    return None


def _without_idle_branches(found: list[tuple[_Place, ErrorDetails]]) -> list[tuple[_Place, ErrorDetails]]:
    """Of a union's alternatives, keep the one that read furthest into the value, and say its problems only.

    When none got past the value itself, all say the same thing (`expected an integer or 'auto'`) and are one line.
    """
    depths: dict[Path, dict[str, tuple[int, int]]] = {}
    for place, _ in found:
        for start, branch in place.branches:
            depth, count = depths.setdefault(start, {}).get(branch, (0, 0))
            depths[start][branch] = (max(depth, len(place.path) - len(start)), count - 1)
    best = {start: max(branches, key=lambda branch: branches[branch]) for start, branches in depths.items()}
    return [
        (place, details)
        for place, details in found
        if all(branch == best[start] or depths[start][best[start]][0] == 0 for start, branch in place.branches)
    ]


def _line(place: _Place, details: ErrorDetails) -> str:
    return f"{dotted(place.path) or 'top level'}: {_message(place, details)}"


def _message(place: _Place, details: ErrorDetails) -> str:
    kind = details["type"]
    if kind == "extra_forbidden":
        known = schema.fields(place.holder) if place.holder else ()
        return f"unknown key.{nearest(str(place.path[-1]), known)}"
    if kind in ("value_error", "assertion_error"):
        return str(details["ctx"]["error"])
    if kind not in _BUILT_IN:
        return details["msg"]
    if kind == "missing":
        return f"missing; needs {describe(place.annotation)}"
    if place.annotation is Any:
        return f"{details['msg']}, got {quote(details['input'])}"
    expected, got = describe(place.annotation), details["input"]
    return f"expected {expected}, got {quote(got)}{_fix(place, kind, got)}"


def _fix(place: _Place, kind: str, got: Any) -> str:
    if kind == "string_type" and isinstance(got, int | float):
        return f"; quote it: '{got}'"
    if kind in ("literal_error", "enum") and isinstance(got, str):
        hint = nearest(got, schema.choices(place.annotation))
        return f".{hint}" if "Did you mean" in hint else ""
    if got is None and place.holder and place.path:
        field = schema.fields(place.holder).get(str(place.path[-1]))
        if field and schema.default(field) is not PydanticUndefined:
            return "; leave the key out for its default"
    return ""
