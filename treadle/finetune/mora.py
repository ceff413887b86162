"""High-rank updates by one square matrix: y = W x + decompress(M compress(x)) (MoRA; Jiang 2024, arXiv:2405.12130).

M has about as many numbers as a low-rank pair of `rank`, and starts as zero. Inputs are folded to its size n, outputs
unfolded from it, without parameters:

    type 1   inputs i and i + n are added; outputs repeat (equation 6)
    type 2   neighbours are added, outputs repeated side by side; 3 and 4 mix: in as 2, out as 1, and the other way
    type 6   blocks of n inputs are rotated by their number, as RoPE does, and all pass through M (equation 9)

The update of types 1 to 4 has rank n, that of type 6 any.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.finetune.adapted import wide
from treadle.finetune.config import FinetuneConfig
from treadle.nn.roles import Role


def square_size(inputs: int, outputs: int, rank: int, type: int) -> int:
    """The n whose square is nearest to the numbers of a pair of that rank; even, for rotations."""
    size = int(math.sqrt((inputs + outputs) * rank) + 0.5)
    return max(2, size // 2 * 2) if type == 6 else max(1, size)


def mora(x: Tensor, square: Tensor, outputs: int, type: int) -> Tensor:
    """decompress(square compress(x)).  x_..I -> y_..O"""
    size = square.shape[0]
    if type in (1, 4, 6):
        blocks = _circular(x, -(-x.shape[-1] // size) * size).unflatten(-1, (-1, size))
        z = _rotated(blocks) if type == 6 else blocks.sum(-2)
    else:
        wide, narrow = _grouped(x.shape[-1], size)
        first, rest = x.split((wide * (narrow + 1), x.shape[-1] - wide * (narrow + 1)), dim=-1)
        sums = first.unflatten(-1, (wide, narrow + 1)).sum(-1), rest.unflatten(-1, (size - wide, narrow)).sum(-1)
        z = torch.cat(sums, dim=-1)
    y = F.linear(z, square)
    if type == 6:
        y = y.flatten(-2)
    if type in (1, 3, 6):
        return _circular(y, outputs)
    wide, narrow = _grouped(outputs, size)
    first, rest = y.split((wide, size - wide), dim=-1)
    return torch.cat((first.repeat_interleave(narrow + 1, -1), rest.repeat_interleave(narrow, -1)), dim=-1)


def _circular(x: Tensor, size: int) -> Tensor:
    """Repeated from its beginning, or cut, to this size."""
    times = -(-size // x.shape[-1])
    return (x if times == 1 else x.repeat(*[1] * (x.ndim - 1), times))[..., :size]


def _grouped(features: int, size: int) -> tuple[int, int]:
    """Of `size` groups of neighbours: how many have one more than the others, and how many those have."""
    return features % size, features // size


def _rotated(blocks: Tensor) -> Tensor:
    count, size = blocks.shape[-2:]
    options: Any = {"device": blocks.device, "dtype": torch.promote_types(blocks.dtype, torch.float32)}
    frequencies = 10000 ** (-torch.arange(0, size, 2, **options) / size)
    angles = torch.outer(torch.arange(count, **options), frequencies).repeat(1, 2)
    half = torch.cat((-blocks[..., size // 2 :], blocks[..., : size // 2]), dim=-1)
    return blocks * angles.cos().to(blocks.dtype) + half * angles.sin().to(blocks.dtype)


class MoRA(nn.Module):
    """What is added to some rows of a matrix's output.  x_..I, y_..O -> y_..O"""

    roles = {"square": "replicate"}

    def __init__(self, inputs: int, outputs: int, rank: int, role: Role, part: str, config: FinetuneConfig):
        super().__init__()
        self.inputs, self.outputs, self.kind, self.dropout = inputs, outputs, config.mora_type, config.dropout
        size = square_size(inputs, outputs, rank, config.mora_type)
        self.square = nn.Parameter(torch.empty(size, size))

    def initial(self, name: str, uniform: Tensor) -> Tensor:
        return torch.zeros_like(uniform)

    def forward(self, x: Tensor, y: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return y + mora(x, self.square.to(x.dtype), self.outputs, self.kind)

    def merged(self, weight_OI: Tensor) -> Tensor:
        """The update's matrix is what it makes of unit vectors, so that there is no second definition of it."""
        square = wide(self.square)
        units_II = torch.eye(self.inputs, device=square.device, dtype=square.dtype)
        return weight_OI + mora(units_II, square, self.outputs, self.kind).t()
