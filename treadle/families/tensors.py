"""Which pieces of a published checkpoint make up each parameter of a model, and whether a folder has them all."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from treadle.config.base import nearest
from treadle.errors import CheckpointError, ConfigError
from treadle.families.family import Family
from treadle.families.layouts import Piece, Plain
from treadle.nn.weights import WeightsReader

Pieces = dict[str, list[Piece]]
Shape = tuple[int, ...]


def pieces(family: Family, model: nn.Module) -> Pieces:
    """The pieces of each parameter, by our names; `multi_token` is for training alone and left out.

    Raises ConfigError for a parameter that the family has no name for.
    """
    modules = dict(model.named_modules())
    found: Pieces = {}
    for name, parameter in model.named_parameters():
        if name.startswith("multi_token."):
            continue
        path, leaf = name.rpartition(".")[::2]
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        layout, ending = family.tensors.get(pattern), ""
        if layout is None:
            layout, ending = family.tensors.get(pattern.rpartition(".")[0]), f".{leaf}"
        if layout is None:
            raise ConfigError(f"the family '{family.model_type}' has no name for the parameter {name}")
        layout = Plain(layout) if isinstance(layout, str) else layout
        source = layout.name + ending
        for number in numbers:
            source = source.replace("*", number, 1)
        block = modules[path.rpartition(".")[0]]
        found[name] = list(layout.pieces(source, parameter, modules[path], block))
    return found


def match(family: Family, model: nn.Module, reader: WeightsReader) -> Pieces:
    """The pieces by the names that the folder uses. Raises CheckpointError that lists every problem once."""
    wanted = pieces(family, model)
    prefix, names = family.prefix, list(reader)
    if prefix and not any(name.startswith(prefix) for name in names):  # the bare model, without its head
        wanted = {ours: [p._replace(source=p.source.removeprefix(prefix)) for p in ps] for ours, ps in wanted.items()}
    expected = {piece.source: piece.shape for ps in wanted.values() for piece in ps}
    depth = str(len(getattr(model, "layers", ())))
    optional = [*(pattern.replace("{depth}", depth) for pattern in family.optional), r".*rotary_emb\.inv_freq"]
    if getattr(getattr(model, "config", None), "tied", False):
        optional.append(r"lm_head\.weight|embed_out\.weight")
    extra = [name for name in names if name not in expected and not any(re.fullmatch(p, name) for p in optional)]
    compare(str(reader.path), expected, {name: reader.shape(name) for name in [*expected, *extra] if name in reader})
    return wanted


def compare(where: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise CheckpointError if names or shapes differ; tensors that differ by their layer alone make one line."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shapes = [name for name in expected if name in found and found[name] != expected[name]]
    lines = [f"missing {group}{_near(names[0], extra)}" for group, names in _grouped(missing, expected)]
    lines += [f"left over {group}" for group, _ in _grouped(extra, found)]
    lines += [
        f"{group} in the model, {'x'.join(map(str, found[names[0]]))} in the file"
        for group, names in _grouped(shapes, expected)
    ]
    if lines:
        raise CheckpointError(f"{where}: the tensors do not fit the model:\n  " + "\n  ".join(lines))


def _near(name: str, names: Sequence[str]) -> str:
    hint = nearest(name, names)
    return f";{hint}" if hint.startswith(" Did you mean") else ""


def _grouped(names: Iterable[str], shapes: Mapping[str, Shape]) -> list[tuple[str, list[str]]]:
    """('model.layers.{0-31}.mlp.up_proj.weight [48 x 32]', its names) for each set that differs by numbers alone."""
    groups: dict[tuple[str, Shape], list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".{}.", name), shapes[name]].append(name)
    told = []
    for (pattern, shape), members in groups.items():
        first, last = members[0], members[-1]
        for low, high in zip(re.findall(r"\.(\d+)\.", first), re.findall(r"\.(\d+)\.", last), strict=True):
            pattern = pattern.replace("{}", low if low == high else f"{{{low}-{high}}}", 1)
        many = f" ({len(members)} tensors)" if len(members) > 1 else ""
        told.append((f"{pattern} [{' x '.join(map(str, shape))}]{many}", members))
    return told
