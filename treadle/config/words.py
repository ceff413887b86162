"""Types in words, one line each (`int > 0`), and values as a reader of YAML knows them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from treadle.config.schema import LISTS, bare, choices, is_config, members

_LONGEST_VALUE = 60  # characters of a value that an error quotes
_NAMES = {str: "text", Path: "path", Any: "any"}
_LIMITS = {  # the constraints of annotated_types and Pydantic, by attribute
    "gt": ">",
    "ge": ">=",
    "lt": "<",
    "le": "<=",
    "multiple_of": "multiple of",
    "min_length": "length >=",
    "max_length": "length <=",
    "pattern": "like",
}


def describe(annotation: Any) -> str:
    """What may stand here: `int > 0`, `silu | gelu`, `list[int]`, `text | null`; a section is `mapping`."""
    parts = [_describe_one(member) for member in members(annotation)]
    if type(None) in get_args(bare(annotation)[0]):
        parts.append("null")
    return " | ".join(dict.fromkeys(parts)) or "null"


def _describe_one(annotation: Any) -> str:
    inner, constraints = bare(annotation)
    if choices(inner) and inner is not bool:
        return " | ".join(choices(inner))
    if inner in LISTS or get_origin(inner) in LISTS:
        items = [describe(arg) for arg in get_args(inner) if arg is not Ellipsis]
        text = f"list[{', '.join(items)}]" if items else "list"
    elif is_config(inner) or inner is dict or get_origin(inner) is dict:
        text = "mapping"
    else:
        text = str(_NAMES.get(inner) or getattr(inner, "__name__", inner))
    # A `Field(...)` inside an `Annotated` holds its constraints in turn.
    nested = [part.metadata if isinstance(part, FieldInfo) else [part] for part in constraints]
    flat = [constraint for parts in nested for constraint in parts]
    limits = [
        f"{sign} {limit}"
        for name, sign in _LIMITS.items()
        for limit in (getattr(constraint, name, None) for constraint in flat)
        if limit is not None
    ]
    return f"{text} {', '.join(limits)}" if limits else text


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
