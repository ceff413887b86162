"""Initialisation as a function of (seed, parameter name, element), so that any sharding starts from the same weights.

Each element is a hash of its index (splitmix64; Steele et al. 2014), turned into a normal number. No generator state
exists: a rank can fill its own piece without the rest, and a parameter's values do not depend on which others exist.
A block whose own parameters start otherwise has `initial(name, uniform)`: it turns uniform numbers into their values.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
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


@torch.no_grad()
def initialise(model: nn.Module, config: InitConfig, *, seed: int, depth: int) -> None:
    """Fill every parameter in place, on whatever device it is."""
    roles = parameter_roles(model)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, leaf = name.rpartition(".")[::2]
        owner = modules[path]
        if hasattr(owner, "initial"):
            fill(parameter, partial(owner.initial, leaf), seed=seed, name=name)
        elif is_matrix(name, roles[name], parameter):
            role: Role = owner.alone if isinstance(owner, GroupedLinear) else roles[name]
            std = config.matrix_std(role, parameter.shape[-1], depth)
            for part, values in _parts(name, owner, parameter):
                fill_normal(values, std, seed=seed, name=part)
        elif name.endswith("bias") or roles[name] == "column":
            parameter.zero_()
        else:
            parameter.fill_(1.0 - getattr(owner, "offset", 0.0))  # a norm starts as the plain one


def _parts(name: str, owner: nn.Module, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each expert, and the stacked projections of a Linear, under a name of its own; any other parameter whole."""
    path, leaf = name.rpartition(".")[::2]
    matrices = {path: parameter}
    if isinstance(owner, GroupedLinear):
        matrices = {f"{path}.{expert}": matrix for expert, matrix in enumerate(parameter)}
    parts = owner.parts if isinstance(owner, Linear | GroupedLinear) else {}
    for prefix, matrix in matrices.items():
        if not parts:
            yield f"{prefix}.{leaf}" if prefix else leaf, matrix
            continue
        for part, values in zip(parts, matrix.split(list(parts.values())), strict=True):
            yield f"{prefix}.{part}.{leaf}", values


def fill_normal(values: Tensor, std: float, *, seed: int, name: str) -> None:
    """Fill with normal numbers of standard deviation `std`, each a function of (seed, name, its index) alone."""
    scale = std * math.sqrt(2)
    fill(values, lambda uniform: torch.erfinv(uniform.mul_(2).sub_(1)).mul_(scale), seed=seed, name=name)


def fill(values: Tensor, function: Callable[[Tensor], Tensor], *, seed: int, name: str) -> None:
    """Fill with `function`, elementwise, of float64 numbers that are uniform between 0 and 1 (both excluded).

    Number i is a function of (seed, name, i) alone.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    flat = values.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        index = torch.arange(start, min(start + CHUNK, flat.numel()), device=values.device)
        uniform = ((_splitmix64(index, key) >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)
        flat[start : start + CHUNK] = function(uniform).to(values.dtype)


def _splitmix64(index: Tensor, key: int) -> Tensor:
    """Mix int64 indices with a key; wrapping multiplication, shifts made logical by a mask."""
    z = index * -0x61C8864680B583EB + key
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & ((1 << 33) - 1))
