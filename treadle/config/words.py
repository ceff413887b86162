"""Types in words: what a place expects (`an integer above 0`), and values as a reader of YAML knows them."""

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from treadle.config.schema import LISTS, bare, choices, is_config, is_family, members

_LONGEST_VALUE = 60  # characters of a value that an error quotes


def describe(annotation: Any) -> str:
    """What is expected here, in words: 'an integer above 0', 'one of silu, gelu', 'a list'."""
    parts = [_describe_one(member) for member in members(annotation)]
    if type(None) in get_args(bare(annotation)[0]):
        parts.append("null")
    return " or ".join(dict.fromkeys(parts)) or "null"


_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "a mapping",
    Any: "a value",
}


def _describe_one(annotation: Any) -> str:
    inner, constraints = bare(annotation)
    origin = get_origin(inner)
    if origin is Literal:
        names = [str(value) for value in get_args(inner)]
        return f"'{names[0]}'" if len(names) == 1 else f"one of {', '.join(names)}"
    if inner in LISTS or origin in LISTS:
        words = _describe_list(inner)
    elif is_family(inner):
        words = f"one of {', '.join(sorted(inner.kinds()))}, or a mapping with its `kind`"
    elif is_config(inner):
        words = "a mapping of keys"
    elif isinstance(inner, type) and issubclass(inner, Enum):
        words = f"one of {', '.join(str(member.value) for member in inner)}"
    else:
        words = _WORDS.get(origin or inner) or f"a {getattr(inner, '__name__', inner)}"
    limits = _limits(constraints)
    return f"{words} {limits}" if limits else words


def _describe_list(annotation: Any) -> str:
    args = [arg for arg in get_args(annotation) if arg is not Ellipsis]
    fixed = get_origin(annotation) is tuple and len(args) == len(get_args(annotation))
    words = f"a list of {len(args)}" if fixed else "a list"
    alike = len(set(map(str, args))) == 1 and not is_config(bare(args[0])[0])
    return f"{words}, each {describe(args[0])}" if alike else words


def _limits(constraints: list[Any]) -> str:
    """'above 0 and at most 1', from annotated_types' and Pydantic's constraints."""
    flat = _flat(constraints)
    words = {
        "gt": "above {}",
        "ge": "of at least {}",
        "lt": "below {}",
        "le": "at most {}",
        "multiple_of": "that is a multiple of {}",
        "pattern": "like {}",
    }
    found = [
        text.format(getattr(constraint, name))
        for name, text in words.items()
        for constraint in flat
        if getattr(constraint, name, None) is not None
    ]
    for constraint in flat:
        low, high = getattr(constraint, "min_length", None) or 0, getattr(constraint, "max_length", None)
        if low and not high:
            found.append("(not empty)" if low == 1 else f"(at least {low})")
        elif high:
            found.append(f"({low} to {high})")
    return " and ".join(found)


def _flat(constraints: list[Any]) -> list[Any]:
    """The constraints, those inside a `Field(...)` of an `Annotated` too."""
    nested = [part.metadata if isinstance(part, FieldInfo) else [part] for part in constraints]
    return [constraint for parts in nested for constraint in parts]


def quote(value: Any) -> str:
    """The value as YAML would show it, in one short line; text in quotes."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, bool | None):
        text = json.dumps(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {quote(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(quote, value)) + "]"
    else:
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def short_type(annotation: Any) -> str:
    """The type for a table: `int > 0`, `silu | gelu`, `list[int]`, `text | null`; a section is `mapping`."""
    parts = [_short_one(member) for member in members(annotation)]
    if type(None) in get_args(bare(annotation)[0]):
        parts.append("null")
    return " | ".join(dict.fromkeys(parts))


def _short_one(annotation: Any) -> str:
    inner, constraints = bare(annotation)
    args = get_args(inner)
    if choices(inner) and inner is not bool:
        return " | ".join(choices(inner))
    if inner in LISTS or get_origin(inner) in LISTS:
        items = [short_type(arg) for arg in args if arg is not Ellipsis]
        text = f"list[{', '.join(items)}]" if items else "list"
    elif is_config(inner) or get_origin(inner) is dict:
        text = "mapping"
    else:
        names = {str: "text", Path: "path", Any: "any"}
        text = str(names.get(inner) or getattr(inner, "__name__", inner))
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{sign} {getattr(constraint, name):g}"
        for name, sign in signs.items()
        for constraint in _flat(constraints)
        if isinstance(getattr(constraint, name, None), int | float)
    ]
    return f"{text} {', '.join(limits)}" if limits else text
