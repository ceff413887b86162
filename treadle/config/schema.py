"""What a schema says about a place in a recipe: which class reads it, which keys it has, what the defaults are.

An *annotation* is a field's type as Pydantic keeps it, with its constraints (`Annotated[int, Gt(0)]`). `Any` stands
for a place about which the schema says nothing.
"""

import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from treadle.config.base import Config, Kind

LISTS = (list, tuple, set, frozenset, Sequence)


def fields(config: type[Config]) -> dict[str, FieldInfo]:
    """The fields by the key that YAML uses for them."""
    return {field.alias or name: field for name, field in config.model_fields.items()}


def annotation_of(field: FieldInfo) -> Any:
    """The field's type together with its constraints."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def bare(annotation: Any) -> tuple[Any, list[Any]]:
    """The type without `Annotated` and aliases, and the constraints found on the way."""
    constraints: list[Any] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *found = get_args(annotation)
            constraints += found
        elif hasattr(annotation, "__value__"):  # type Name = ...
            annotation = annotation.__value__
        else:
            return annotation, constraints


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, `None` left out; the annotation itself if it is no union."""
    inner, _ = bare(annotation)
    if get_origin(inner) in (Union, types.UnionType):
        return [member for part in get_args(inner) for member in members(part)]
    return [] if inner is type(None) else [annotation]


def is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def is_family(annotation: Any) -> bool:
    """Whether this is a `Kind` whose members are told apart by name."""
    return is_config(annotation) and issubclass(annotation, Kind) and "kind" not in annotation.model_fields


def config_class(annotation: Any, value: Any) -> type[Config] | None:
    """The class that would read the raw `value` at this place; None if that can't be told."""
    candidates = [inner for inner, _ in map(bare, members(annotation)) if is_config(inner)]
    kind = value.get("kind") if isinstance(value, Mapping) else value
    for family in filter(is_family, candidates):
        if isinstance(kind, str) and kind in family.kinds():
            return family.kinds()[kind]
    single = [candidate for candidate in candidates if not is_family(candidate)]
    for member in single:
        if kind is not None and "kind" in member.model_fields and kind == member.model_fields["kind"].default:
            return member
    ambiguous = len(single) != 1 or isinstance(value, str) or (kind is not None and len(candidates) > 1)
    return None if ambiguous else single[0]


def element(annotation: Any, index: int = 0) -> Any:
    """The annotation of a list's item; `Any` if this is no list."""
    for member in members(annotation):
        inner, _ = bare(member)
        if inner in LISTS or get_origin(inner) in LISTS:
            args = get_args(inner)
            if get_origin(inner) is tuple and args and args[-1] is not Ellipsis:
                return args[index] if index < len(args) else Any
            return args[0] if args else Any
    return Any


def entry(annotation: Any) -> Any | None:
    """The annotation of a dictionary's values; None if this is no dictionary with free keys."""
    for member in members(annotation):
        inner, _ = bare(member)
        if inner is dict or get_origin(inner) in (dict, Mapping):
            args = get_args(inner)
            return args[1] if args else Any
    return None


def child(annotation: Any, value: Any, key: str | int) -> Any:
    """The annotation under `key` of the raw `value`; `Any` if the schema does not say."""
    if isinstance(key, int) and not isinstance(value, Mapping):
        return element(annotation, key)
    config = config_class(annotation, value)
    if config is not None:
        field = fields(config).get(str(key))
        return annotation_of(field) if field else Any
    values = entry(annotation)
    return Any if values is None else values


def plain(value: Any) -> Any:
    """A value or default as raw data: dictionaries, lists, and for a Config its kind and the keys it was built with.

    Keys that a validator has filled in are left out, so that an override of one key lets them follow.
    """
    if isinstance(value, Config):
        return {
            field.alias or name: plain(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if name in value.model_fields_set or name == "kind"
        }
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def default(field: FieldInfo) -> Any:
    """The field's default as raw data; `PydanticUndefined` if it has none."""
    if field.default_factory is not None and field.default_factory_takes_validated_data:
        return PydanticUndefined
    value = field.get_default(call_default_factory=True)
    return value if value is PydanticUndefined else plain(value)


def choices(annotation: Any) -> list[str]:
    """The names that may stand here: of a `Literal`, an `Enum`, a boolean, or the kinds of a family."""
    names: list[str] = []
    for inner, _ in map(bare, members(annotation)):
        if get_origin(inner) is Literal:
            names += map(str, get_args(inner))
        elif inner is bool:
            names += ["true", "false"]
        elif is_family(inner):
            names += inner.kinds()
        elif isinstance(inner, type) and issubclass(inner, Enum):
            names += [str(member.value) for member in inner]
    return names
