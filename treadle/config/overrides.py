"""Overrides from the shell: `model.dim=512`, `model.layers.*.mixer.window=512`, `**.bias=true`.

They change the raw recipe before it is validated. The value is YAML (`[1, 2]`, `null`, `{kind: x}`, `3e-4`, text). `*`
stands for any one key or list index, `**` for any number of them. Where the recipe leaves a key to its default, the
schema tells what is there.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined

from treadle.config import schema as schemas
from treadle.config import yaml_io
from treadle.config.base import Config
from treadle.config.words import quote
from treadle.errors import ConfigError


@dataclass(frozen=True)
class Assignment:
    """One parsed override. `path` holds keys, list indices as text, `*` and `**`."""

    text: str
    path: tuple[str, ...]
    value: Any

    @property
    def is_glob(self) -> bool:
        return "*" in self.path or "**" in self.path

    @property
    def is_deep(self) -> bool:
        return "**" in self.path


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


def apply(raw: Mapping[str, Any], schema: type[Config], assignment: Assignment) -> dict[str, Any]:
    """A copy of the raw recipe with one override applied. ConfigError if it matches nothing or leads nowhere."""
    changed, count = _assign(raw, schema, assignment.path, assignment, ())
    if count == 0:
        close = _closest(raw, schema, assignment)
        raise ConfigError(f"override '{assignment.text}': matches nothing.{f' Nearest: {close}' if close else ''}")
    return changed


def _assign(
    node: Any, annotation: Any, path: tuple[str, ...], assignment: Assignment, done: tuple[str, ...]
) -> tuple[Any, int]:
    """`node` with the value set at every match of `path` below it, and the number of matches."""
    head, *rest = path
    node = _expand_shorthand(node, annotation)
    if not isinstance(node, Mapping | list):
        if assignment.is_glob:
            return node, 0
        raise ConfigError(f"override '{assignment.text}': {'.'.join(done)} is {quote(node)} and has no '{head}' inside")
    if head == "**":
        node, count = _assign(node, annotation, tuple(rest), assignment, done)
        for key in _keys(node, annotation):
            node, found = _descend(node, annotation, key, path, assignment, done)
            count += found
        return node, count
    if head == "*":
        count = 0
        for key in _keys(node, annotation):
            node, found = _descend(node, annotation, key, tuple(rest), assignment, done)
            count += found
        return node, count
    step = _index(node, head, assignment, done) if isinstance(node, list) else head
    if step is None or (assignment.is_glob and not _may_hold(node, annotation, step, assignment)):
        return node, 0
    return _descend(node, annotation, step, tuple(rest), assignment, done)


def _descend(
    node: Any, annotation: Any, key: str | int, rest: tuple[str, ...], assignment: Assignment, done: tuple[str, ...]
) -> tuple[Any, int]:
    """Assign below `node[key]`, or to it if nothing of the path is left. `node` is copied if anything changes."""
    if not rest:
        return _with(node, key, assignment.value), 1
    value = _peek(node, annotation, key)
    below = schemas.child(annotation, node, key)
    if value is None and not assignment.is_glob:
        # A section that is off (null) starts from its default again; one that nobody has written yet starts empty,
        # and validation tells whether it may be there.
        rest_of_node = {name: item for name, item in node.items() if name != key} if isinstance(node, Mapping) else {}
        value = _peek(rest_of_node, annotation, key) or {}
    changed, count = _assign(value, below, rest, assignment, (*done, str(key)))
    return (_with(node, key, changed), count) if count else (node, 0)


def _with(node: Any, key: str | int, value: Any) -> Any:
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


def _may_hold(node: Any, annotation: Any, key: str | int, assignment: Assignment) -> bool:
    """Whether a glob ends here: the key is written, or the schema knows it, or the schema says nothing.

    `**` reaches places that nobody had in mind, so that there "says nothing" is not enough.
    """
    if isinstance(node, list) or key in node:
        return True
    config = schemas.config_class(annotation, node)
    if config is not None:
        return key in schemas.fields(config)
    return not assignment.is_deep and schemas.entry(annotation) is None


def _index(node: list, name: str, assignment: Assignment, done: tuple[str, ...]) -> int | None:
    index = int(name) if name.lstrip("-").isdigit() else None
    if index is not None and -len(node) <= index < len(node):
        return index % len(node)
    if assignment.is_glob:
        return None
    problem = f"expected an index or *, got '{name}'" if index is None else f"has no index {name}"
    raise ConfigError(f"override '{assignment.text}': {'.'.join(done)} is a list of {len(node)}; {problem}")


def _closest(raw: Any, schema: type[Config], assignment: Assignment) -> str | None:
    """The existing path that looks most like the override's, with `*` for list indices where the override has globs."""
    pattern = [part for part in assignment.path if part != "**"]
    known: dict[str, str] = {}
    for path in _walk(raw, schema):
        general = ["*" if isinstance(part, int) else part for part in path]
        # Behind `**` only the end of the path was written, so only the end is compared.
        compared = general[-len(pattern) :] if assignment.is_deep else general
        known.setdefault(".".join(compared), ".".join(general))
    found = difflib.get_close_matches(".".join(pattern), known, n=1, cutoff=0.3)
    return known[found[0]] if found else None


def _walk(node: Any, annotation: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every path that is written or that the schema adds by default."""
    node = _expand_shorthand(node, annotation)
    for key in _keys(node, annotation):
        yield (*path, key)
        yield from _walk(_peek(node, annotation, key), schemas.child(annotation, node, key), (*path, key))
