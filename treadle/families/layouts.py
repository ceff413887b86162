"""How a parameter of ours lies in the tensors of a published checkpoint.

Each layout says it by views: a *piece* is a part of a source tensor and the part of our parameter that holds the same
numbers. Copying one way imports, the other way exports; nothing else has to be written for either.

E experts, D model dim, F feed-forward dim, H heads, G key-value heads, R query heads per key-value head, K head dim.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from treadle.nn.linear import GroupedLinear

View = Callable[[Tensor], Tensor]


class Piece(NamedTuple):
    """source: the tensor's name there, and its shape. select, place: equal views of it and of our parameter."""

    source: str
    shape: tuple[int, ...]
    select: View
    place: View


def whole(tensor: Tensor) -> Tensor:
    return tensor


def _item(index: Any, tensor: Tensor) -> Tensor:
    return tensor[index]


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


def _heads(rows: slice, shape: tuple[int, ...], group: slice, tensor: Tensor) -> Tensor:
    return tensor[rows].unflatten(0, shape)[:, group]


def _then(first: View, second: View) -> View:
    return lambda tensor: second(first(tensor))


class Layout:
    """name: the tensor's or module's there, with `*` where the number of the layer stands."""

    def __init__(self, name: str):
        self.name = name

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        """source: the name with the layer's number, and the parameter's last word. parameter: may be on meta.
        module: that holds it. block: that holds the module."""
        raise NotImplementedError


class Plain(Layout):
    """The same tensor under another name; or one for each of our module's parts, experts or both.

    `{part}` in the name stands for the part's name (or the one given for it), `{expert}` for the expert's number.
    """

    def __init__(self, name: str, **parts: str):
        super().__init__(name)
        self.parts = parts

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        if isinstance(module, GroupedLinear):
            for expert in range(parameter.shape[0]):
                yield from self._rows(source, parameter[expert], module, partial(_item, expert), expert)
        else:
            yield from self._rows(source, parameter, module, whole, None)

    def _rows(
        self, source: str, tensor: Tensor, module: nn.Module, inside: View, expert: int | None
    ) -> Iterator[Piece]:
        parts: dict[str, int] = getattr(module, "parts", {}) if "{part}" in source else {"": tensor.shape[0]}
        first: dict[str, str] = {}  # neighbouring parts that are given the same name lie in one tensor
        sizes: dict[str, int] = {}
        for part, size in parts.items():
            part = first.setdefault(self.parts.get(part, part), part)
            sizes[part] = sizes.get(part, 0) + size
        start = 0
        for part, size in sizes.items():
            rows = slice(start, start + size)
            name = source.format(part=self.parts.get(part, part), expert=expert)
            yield Piece(name, (size, *tensor.shape[1:]), whole, _then(inside, partial(_item, rows)))
            start += size


class Transposed(Layout):
    """A matrix stored inputs first (GPT-2), or one for every expert; other parameters as they are."""

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        if parameter.ndim == 1:
            yield Piece(source, tuple(parameter.shape), whole, whole)
        else:
            shape = (*parameter.shape[:-2], parameter.shape[-1], parameter.shape[-2])
            yield Piece(source, shape, whole, _swapped)


class ByBlock(Plain):
    """`{which}` in the name stands for what `which` says of the block that holds the module."""

    def __init__(self, name: str, which: Callable[[nn.Module], str], **parts: str):
        super().__init__(name, **parts)
        self.which = which

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        return super().pieces(source.replace("{which}", self.which(block)), parameter, module, block)


class Whole(Layout):
    """The same tensor, all experts' and all parts' in one."""

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        yield Piece(source, tuple(parameter.shape), whole, whole)


class QueryKeyValue(Layout):
    """Queries, keys and values in one tensor, group by group: a key-value head's R query heads, its key, its value.

    With one query head per group that is head by head (GPT-NeoX, BLOOM), with one group all queries first (Falcon).
    """

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        parts: dict[str, int] = dict(module.parts)  # type: ignore[arg-type]
        K = int(block.head_dim)  # type: ignore[arg-type]
        G, R = parts["k"] // K, parts["q"] // parts["k"]
        shape = tuple(parameter.shape)
        start = 0
        for name, first, heads in (("q", 0, R), ("k", R, 1), ("v", R + 1, 1)):
            rows, group = slice(start, start + parts[name]), slice(first, first + heads)
            yield Piece(
                source,
                shape,
                partial(_heads, slice(None), (G, R + 2, K), group),
                partial(_heads, rows, (G, heads, K), slice(None)),
            )
            start += parts[name]


class InterleavedExperts(Layout):
    """All experts' gate and up in one tensor, inputs first, their columns by turns (GPT-OSS); the bias likewise."""

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        experts, outputs, *inputs = parameter.shape
        for turn, rows in enumerate((slice(0, outputs // 2), slice(outputs // 2, outputs))):
            yield Piece(
                source,
                (experts, *inputs, outputs),
                partial(_item, (..., slice(turn, None, 2))),
                _then(partial(_item, (slice(None), rows)), _swapped if inputs else whole),
            )


class HeadByHead(Layout):
    """The module's parts in one tensor, head by head: a head's rows of each part, in order (DeepSeek's kv_b_proj)."""

    def pieces(self, source: str, parameter: Tensor, module: nn.Module, block: nn.Module) -> Iterator[Piece]:
        parts: dict[str, int] = dict(module.parts)  # type: ignore[arg-type]
        H = int(block.heads)  # type: ignore[arg-type]
        shape, width = tuple(parameter.shape), sum(parts.values()) // H
        start = 0
        for size in parts.values():
            rows, group = slice(start, start + size), slice(start // H, (start + size) // H)
            yield Piece(
                source,
                shape,
                partial(_heads, slice(None), (H, width), group),
                partial(_heads, rows, (H, size // H), slice(None)),
            )
            start += size
