"""Configurations out: as plain data, as YAML that can be run again, as a table of every key, as a difference."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from treadle.config import schema as schemas
from treadle.config import yaml_io
from treadle.config.base import Config, Kind
from treadle.config.words import describe, quote


class Key(NamedTuple):
    """One key of a schema. `[]` in its path stands for a list index, `{}` for a free key, `(name)` for a kind."""

    key: str
    type: str
    default: str
    description: str


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()  # stands in a difference for the side that has no such key


def to_dict(config: Config) -> dict[str, Any]:
    """The whole configuration as JSON-able data; `resolve(type(config), to_dict(config)) == config`."""
    return _kind_first(config.model_dump(mode="json", serialize_as_any=True))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, every default written out; reading it gives the same configuration."""
    return yaml_io.dump(to_dict(config))


def keys(schema: type[Config]) -> list[Key]:
    """Every key that a recipe of this schema may hold, in field order, each kind of each family included."""
    return list(_keys_of(schema, "", (schema,)))


def diff(a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) wherever they differ; `ABSENT` for a key that one side does not have."""
    left, right = (dict(_leaves(to_dict(side) if isinstance(side, Config) else side)) for side in (a, b))
    rows = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in dict.fromkeys([*left, *right])]
    # Types count: 1 and True, or 1 and 1.0, are equal to Python but not to a reader.
    return [(key, x, y) for key, x, y in rows if x != y or type(x) is not type(y)]


def _kind_first(data: Any) -> Any:
    """A member of a family opens with its name; Pydantic would put the fields of the base class before it."""
    if isinstance(data, dict):
        first = {"kind": data["kind"]} if "kind" in data else {}
        return {**first, **{key: _kind_first(value) for key, value in data.items()}}
    return [_kind_first(item) for item in data] if isinstance(data, list) else data


def _keys_of(config: type[Config], prefix: str, above: tuple[type[Config], ...]) -> Iterator[Key]:
    for name, field in schemas.fields(config).items():
        if name == "kind" and issubclass(config, Kind):
            continue  # the path says it
        annotation = schemas.annotation_of(field)
        yield Key(prefix + name, describe(annotation), _default(field), field.description or "")
        yield from _keys_below(annotation, prefix + name, above)


def _keys_below(annotation: Any, path: str, above: tuple[type[Config], ...]) -> Iterator[Key]:
    """The keys inside a field's value. A class that is among those `above` is not entered again."""
    for inner, _ in map(schemas.bare, schemas.members(annotation)):
        if schemas.is_family(inner):
            for name, member in inner.kinds().items() if inner not in above else ():
                yield Key(f"{path}({name})", "kind", "", _first_line(member))
                yield from _keys_of(member, f"{path}({name}).", (*above, inner, member))
        elif schemas.is_config(inner):
            if inner not in above:
                yield from _keys_of(inner, f"{path}.", (*above, inner))
        elif inner in schemas.LISTS or get_origin(inner) in schemas.LISTS:
            for item in dict.fromkeys(arg for arg in get_args(inner) if arg is not Ellipsis):
                yield from _keys_below(item, f"{path}[]", above)
        elif (value := schemas.entry(inner)) is not None:
            yield from _keys_below(value, f"{path}{{}}", above)


def _first_line(config: type[Config]) -> str:
    return (config.__doc__ or "").strip().partition("\n")[0]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = schemas.default(field)
    if value is PydanticUndefined:
        return "computed"
    if isinstance(value, Mapping) and list(value) == ["kind"]:
        return str(value["kind"])
    if isinstance(value, str) and value:
        return value
    return quote(to_jsonable_python(value)) if value != {} else ""


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys down to plain values; a list of plain values is one value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif not path and value == {}:
        return
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
