"""Initialisation as a function of (seed, parameter name, element), so that any sharding starts from the same weights.

Each element is a hash of its index (splitmix64; Steele et al. 2014), turned into a normal number. No generator state
exists: a rank can fill its own piece without the rest, and a parameter's values do not depend on which others exist.
A block whose own parameters start otherwise has `initial(name, uniform)`, which turns uniform numbers into their values.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from treadle.config import Kind
from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.roles import Role, is_matrix, parameter_roles

CHUNK = 1 << 22  # elements hashed at once: bounds the scratch memory to a few hundred MB at most


class InitConfig(Kind):
    """How weights start. Norms start with a factor of one; biases and other vectors over output features at zero."""

    def matrix_std(self, role: Role, inputs: int, depth: int) -> float:
        """Standard deviation of a matrix with this role and fan-in, in a stack of `depth` layers."""
        raise TypeError(f"{type(self).__name__} does not define matrix_std")


class NormalInitConfig(InitConfig):
    """The same standard deviation everywhere (GPT-2, Llama)."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = Field(0.02, description="standard deviation of every matrix")
    scale_residual: bool = Field(
        True, description="divide by sqrt(2 layers) where a matrix writes to the residual stream"
    )

    def matrix_std(self, role: Role, inputs: int, depth: int) -> float:
        return self.std / math.sqrt(2 * depth) if role == "row" and self.scale_residual else self.std


class FanInInitConfig(InitConfig):
    """Standard deviation gain / sqrt(inputs): outputs start at the size of inputs, logits at about one."""

    kind: Literal["fan_in"] = "fan_in"
    gain: PositiveFloat = Field(1.0, description="factor on every matrix")
    scale_residual: bool = Field(
        True, description="divide by sqrt(2 layers) where a matrix writes to the residual stream"
    )

    def matrix_std(self, role: Role, inputs: int, depth: int) -> float:
        std = self.gain / math.sqrt(inputs)
        return std / math.sqrt(2 * depth) if role == "row" and self.scale_residual else std


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: its values, the index of the first of them in the whole, and the shape of the whole."""

    values: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Piece":
        return cls(tensor, (0,) * tensor.ndim, tuple(tensor.shape))

    def within(self, start: int, stop: int, dimension: int = 0) -> "Piece":
        """What lies between two indices of the whole, as a piece of that part."""
        offset, size = self.offsets[dimension], self.values.shape[dimension]
        first, last = max(start, offset), min(stop, offset + size)
        values = self.values.narrow(dimension, max(0, min(first - offset, size)), max(0, last - first))
        offsets, shape = list(self.offsets), list(self.shape)
        offsets[dimension], shape[dimension] = first - start, stop - start
        return Piece(values, tuple(offsets), tuple(shape))

    def select(self, index: int) -> "Piece":
        """One entry of the first dimension, which the piece has to hold."""
        return Piece(self.values[index - self.offsets[0]], self.offsets[1:], self.shape[1:])


Pieces = Callable[[str, Tensor], Sequence[Piece]]


def whole_piece(name: str, parameter: Tensor) -> Sequence[Piece]:
    return [Piece.whole(parameter)]


@torch.no_grad()
def initialise(model: nn.Module, config: InitConfig, *, seed: int, depth: int, pieces: Pieces = whole_piece) -> None:
    """Fill every parameter in place, on whatever device it is. pieces: what is here of a parameter, by its name."""
    roles = parameter_roles(model)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, leaf = name.rpartition(".")[::2]
        owner = modules[path]
        for here in pieces(name, parameter):
            if hasattr(owner, "initial"):
                _fill(here, partial(owner.initial, leaf), seed=seed, name=name)
            elif is_matrix(name, roles[name], parameter):
                role: Role = owner.alone if isinstance(owner, GroupedLinear) else roles[name]
                std = config.matrix_std(role, parameter.shape[-1], depth)
                for part, values in _parts(name, owner, here):
                    _fill(values, _normal(std), seed=seed, name=part)
            elif name.endswith("bias") or roles[name] == "column":
                here.values.zero_()
            else:
                here.values.fill_(1.0 - getattr(owner, "offset", 0.0))  # a norm starts as the plain one


def _parts(name: str, owner: nn.Module, here: Piece) -> Iterator[tuple[str, Piece]]:
    """Each expert, and the stacked projections of a Linear, under a name of its own; any other parameter whole."""
    path, leaf = name.rpartition(".")[::2]
    matrices = {path: here}
    if isinstance(owner, GroupedLinear):
        experts = range(here.offsets[0], here.offsets[0] + here.values.shape[0])
        matrices = {f"{path}.{expert}": here.select(expert) for expert in experts}
    parts = owner.parts if isinstance(owner, Linear | GroupedLinear) else {}
    for prefix, matrix in matrices.items():
        if not parts:
            yield f"{prefix}.{leaf}" if prefix else leaf, matrix
            continue
        start = 0
        for part, size in parts.items():
            yield f"{prefix}.{part}.{leaf}", matrix.within(start, start + size)
            start += size


def fill_normal(values: Tensor, std: float, *, seed: int, name: str) -> None:
    """Fill with normal numbers of standard deviation `std`, each a function of (seed, name, its index) alone."""
    _fill(Piece.whole(values), _normal(std), seed=seed, name=name)


def _normal(std: float) -> Callable[[Tensor], Tensor]:
    scale = std * math.sqrt(2)
    return lambda uniform: torch.erfinv(uniform.mul_(2).sub_(1)).mul_(scale)


def _fill(here: Piece, function: Callable[[Tensor], Tensor], *, seed: int, name: str) -> None:
    """Fill with `function`, elementwise, of float64 numbers that are uniform between 0 and 1 (both excluded).

    Number i of the whole is a function of (seed, name, i) alone.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    values = here.values
    if values.numel() == 0:
        return
    rows = max(1, CHUNK // (values.numel() // values.shape[0]))
    for start in range(0, values.shape[0], rows):
        slab = values[start : start + rows]
        index = _index(here, start, slab)
        uniform = ((_splitmix64(index, key) >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)
        slab.copy_(function(uniform))


def _index(here: Piece, start: int, slab: Tensor) -> Tensor:
    """Where in the whole each element of a slab lies, which begins at row `start` of the piece.  -> int64"""
    index = torch.zeros((1,) * slab.ndim, dtype=torch.int64, device=slab.device)
    for dimension, size in enumerate(slab.shape):
        first = here.offsets[dimension] + (start if dimension == 0 else 0)
        places = torch.arange(first, first + size, device=slab.device) * math.prod(here.shape[dimension + 1 :])
        index = index + places.view([-1 if d == dimension else 1 for d in range(slab.ndim)])
    return index


def _splitmix64(index: Tensor, key: int) -> Tensor:
    """Mix int64 indices with a key; wrapping multiplication, shifts made logical by a mask."""
    z = index * -0x61C8864680B583EB + key
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & ((1 << 33) - 1))
