"""YAML text in and out: no surprises in what a plain word means, and errors that name the file and the line.

Read: only `true`/`false` are booleans, `3e-4` is a float, `1_000` an integer, and `no`, `1:30` or `2026-01-31` are
text. Written: whatever another YAML 1.1 reader might take for something else is quoted.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from treadle.errors import ConfigError

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
           |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
           |[0-9][0-9_]*[eE][-+]?[0-9]+
           |\.(?:inf|Inf|INF))
        |\.(?:nan|NaN|NAN)""",
    re.VERBOSE,
)
_NULL = re.compile(r"~|null|Null|NULL|")
_MERGE = re.compile(r"<<")
# Line breaks of other systems and byte order marks: PyYAML would write them as they are and read back a space.
_NEEDS_ESCAPE = re.compile("[\r\x85\u2028\u2029\ufeff]")
_SHORT_LIST = 80  # characters; a longer list goes one item per line


class Loader(yaml.SafeLoader):
    """Safe YAML with the plain words above, and duplicate keys refused."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a plain word"
            elif key.value in lines and not key.tag.endswith(":merge"):
                problem = f"duplicate key '{key.value}', first on line {lines[key.value]}"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0 if text.lstrip("+-")[1:2] in ("b", "o", "x") else 10)


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))


def _pattern(pattern: re.Pattern) -> re.Pattern:
    return re.compile(f"^(?:{pattern.pattern})$", pattern.flags)


for _tag, _words, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", _MERGE, "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern(_words), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class Dumper(yaml.SafeDumper):
    """Field order kept, lists indented under their key, no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if _NEEDS_ESCAPE.search(text) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


def _represent_float(dumper: Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        text = text.replace("inf", ".inf").replace("nan", ".nan")
    elif "e" in text:  # other readers want the dot and the sign: 1.0e-5
        mantissa, exponent = text.split("e")
        text = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_list(dumper: Dumper, items: list) -> yaml.SequenceNode:
    nested = any(isinstance(item, dict) or (isinstance(item, str) and "\n" in item) for item in items)
    short = not nested and len(repr(items)) <= _SHORT_LIST
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=short)


Dumper.add_representer(str, _represent_str)
Dumper.add_representer(float, _represent_float)
Dumper.add_representer(list, _represent_list)
# On top of YAML 1.1's own words, so that the text "3e-4" is quoted and stays text.
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _pattern(_FLOAT), list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _pattern(_INT), list("-+0123456789"))


def parse(text: str, origin: str) -> Any:
    """The value that YAML text stands for; ConfigError with `origin:line` if it is not YAML."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: {problem}{_tab_hint(problem)}") from None


def _tab_hint(problem: str) -> str:
    return "; indent with spaces, not tabs" if r"'\t'" in problem else ""


def parse_scalar(text: str) -> Any:
    """The value of one plain word or sentence, as it would be read after `key: `, but never a comment or a mapping."""
    loader = Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return text if tag.endswith((":str", ":merge")) else loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def read_text(path: Path) -> str:
    """The file's text; ConfigError if there is none to read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def dump(data: Any) -> str:
    """Readable YAML of plain data (mappings, lists, text, numbers, booleans, None); `parse` gives it back."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
