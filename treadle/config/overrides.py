"""Overrides from the shell: `model.dim=512`, `model.layers.*.mixer.window=512`, `**.bias=true`.

They change the raw recipe before it is validated. The value is YAML (`[1, 2]`, `null`, `{kind: x}`, `3e-4`, text). `*`
stands for any one key or list index, `**` for any number of them. Where the recipe leaves a key to its default, the
schema tells what is there.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined

from treadle.config import schema as schemas
from treadle.config import yaml_io
from treadle.config.base import Config
from treadle.config.words import quote
from treadle.errors import ConfigError

Names = tuple[str, ...]  # of one step on the way: a key, or a list index as it is counted from either end


@dataclass(frozen=True)
class Assignment:
    """One parsed override. `path` holds keys, list indices as text, `*` and `**`."""

    text: str
    path: tuple[str, ...]
    value: Any


def parse(text: str) -> Assignment:
    """`model.layers[0].heads=4` -> path (model, layers, 0, heads), value 4. ConfigError if it is no assignment."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().replace("[", ".").replace("]", "").split("."))
    if not equals or not all(path):
        raise ConfigError(f"override '{text}': expected key=value, such as model.dim=512")
    if path[-1] == "**":
        raise ConfigError(f"override '{text}': `**` needs a key behind it, such as **.bias=true")
    # Only the shapes that are meant as YAML are read as YAML: `prompt=Once: upon #a time` is text.
    is_flow = value.lstrip()[:1] in ("[", "{", "'", '"')
    read = yaml_io.parse(value, f"override '{text}'") if is_flow else yaml_io.parse_scalar(value.strip())
    return Assignment(text, path, read)


def apply(raw: dict[str, Any], schema: type[Config], assignment: Assignment) -> dict[str, Any]:
    """A copy of the raw recipe with one override applied. ConfigError if it matches nothing or leads nowhere."""
    places = [assignment.path]
    if "*" in assignment.path or "**" in assignment.path:
        places = [tuple(names[0] for names in place) for place in _walk(raw, schema) if _fits(place, assignment.path)]
    if not places:
        close = _closest(raw, schema, assignment)
        raise ConfigError(f"override '{assignment.text}': matches nothing.{f' Nearest: {close}' if close else ''}")
    for place in places:
        raw = _set(raw, schema, place, assignment, ())
    return raw


def _fits(place: Sequence[Names], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not place
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        return any(_fits(place[skipped:], rest) for skipped in range(len(place)))
    return bool(place) and (head == "*" or head in place[0]) and _fits(place[1:], rest)


def _set(node: Any, annotation: Any, path: Sequence[str], assignment: Assignment, done: tuple[str, ...]) -> Any:
    """`node` with the value at `path` below it. What changes is copied."""
    head, *rest = path
    node = _expand_shorthand(node, annotation)
    if not isinstance(node, Mapping | list):
        raise ConfigError(f"override '{assignment.text}': {'.'.join(done)} is {quote(node)} and has no '{head}' inside")
    key = _index(node, head, assignment, done) if isinstance(node, list) else head
    value = assignment.value
    if rest:
        below = _peek(node, annotation, key)
        if below is None:
            # A section that is off (null) starts from its default again; one that nobody has written yet starts empty,
            # and validation tells whether it may be there.
            others = {name: item for name, item in node.items() if name != key} if isinstance(node, Mapping) else {}
            below = _peek(others, annotation, key) or {}
        value = _set(below, schemas.child(annotation, node, key), rest, assignment, (*done, str(key)))
    if isinstance(node, list):
        return [value if index == key else item for index, item in enumerate(node)]
    return {**node, key: value}


def _peek(node: Any, annotation: Any, key: str | int) -> Any:
    """`node[key]`, or the schema's default for it; None if there is neither."""
    if isinstance(node, list):
        return node[int(key)]
    if key in node:
        return node[key]
    config = schemas.config_class(annotation, node)
    field = schemas.fields(config).get(str(key)) if config else None
    default = schemas.default(field) if field else None
    return None if default is PydanticUndefined else default


def _expand_shorthand(node: Any, annotation: Any) -> Any:
    """`attention` -> `{kind: attention}` where a kind is expected."""
    config = schemas.config_class(annotation, node) if isinstance(node, str) else None
    return {"kind": node} if config is not None else node


def _keys(node: Any, annotation: Any) -> list[str | int]:
    """What is inside: list indices, or the keys written and those that the schema adds."""
    if isinstance(node, list):
        return list(range(len(node)))
    if not isinstance(node, Mapping):
        return []
    config = schemas.config_class(annotation, node)
    return list(dict.fromkeys([*node, *(schemas.fields(config) if config else ())]))


def _index(node: list, name: str, assignment: Assignment, done: tuple[str, ...]) -> int:
    index = int(name) if name.lstrip("-").isdigit() else None
    if index is not None and -len(node) <= index < len(node):
        return index % len(node)
    problem = f"expected an index or *, got '{name}'" if index is None else f"has no index {name}"
    raise ConfigError(f"override '{assignment.text}': {'.'.join(done)} is a list of {len(node)}; {problem}")


def _closest(raw: Any, schema: type[Config], assignment: Assignment) -> str | None:
    """The existing path that looks most like the override's, with `*` for list indices."""
    pattern = [part for part in assignment.path if part != "**"]
    known: dict[str, str] = {}
    for place in _walk(raw, schema):
        general = ["*" if len(names) > 1 else names[0] for names in place]
        # Behind `**` only the end of the path was written, so only the end is compared.
        compared = general[-len(pattern) :] if "**" in assignment.path else general
        known.setdefault(".".join(compared), ".".join(general))
    found = difflib.get_close_matches(".".join(pattern), known, n=1, cutoff=0.3)
    return known[found[0]] if found else None


def _walk(node: Any, annotation: Any, place: tuple[Names, ...] = ()) -> Iterator[tuple[Names, ...]]:
    """Every place that is written or that the schema adds by default."""
    node = _expand_shorthand(node, annotation)
    for key in _keys(node, annotation):
        names = (str(key), str(key - len(node))) if isinstance(key, int) else (key,)
        yield (*place, names)
        yield from _walk(_peek(node, annotation, key), schemas.child(annotation, node, key), (*place, names))
