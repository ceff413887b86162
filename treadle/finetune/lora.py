"""Low-rank updates: y = W x + s B A x, with B and A the only things that learn (Hu et al. 2021, arXiv:2106.09685).

s = alpha / rank, or alpha / sqrt(rank) (rsLoRA). A starts uniform, B as zero; or both as the largest singular vectors
of W, which is then left without them (PiSSA). DoRA learns each row's direction and its length apart.

I inputs, O outputs, R rank, E experts, N rows.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.finetune.adapted import wide
from treadle.finetune.config import FinetuneConfig
from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.roles import Role
from treadle.parallel.collectives import Peers, total


class Factor(Linear):
    """A matrix that learns. bound: it starts uniform between +-bound. lr_ratio: its rate, by that of others."""

    def __init__(self, inputs: int, outputs: int, bound: float, *, part: str | None = None, lr_ratio: float = 1.0):
        super().__init__(inputs, outputs, parts=None if part is None else {part: outputs})
        self.bound, self.lr_ratio = bound, lr_ratio

    def initial(self, name: str, uniform: Tensor) -> Tensor:
        return uniform.mul_(2).sub_(1).mul_(self.bound)


class GroupedFactor(GroupedLinear):
    """The same for every expert."""

    def __init__(
        self, like: GroupedLinear, inputs: int, outputs: int, bound: float, alone: Role, *, lr_ratio: float = 1.0
    ):
        options = {"active": like.active, "implementation": like.implementation}
        super().__init__(like.experts, inputs, outputs, alone=alone, **options)  # type: ignore[arg-type]
        self.bound, self.lr_ratio = bound, lr_ratio

    def initial(self, name: str, uniform: Tensor) -> Tensor:
        return uniform.mul_(2).sub_(1).mul_(self.bound)


class LoRA(nn.Module):
    """What is added to some rows of a matrix's output. role: of that matrix.  x_..I, y_..O -> y_..O"""

    peers: Peers | None = None

    def __init__(self, inputs: int, outputs: int, rank: int, role: Role, part: str, config: FinetuneConfig):
        super().__init__()
        self.role, self.rank, self.dropout = role, rank, config.dropout
        self.alpha, self.scale = config.alpha, config.alpha / (math.sqrt(rank) if config.rs else rank)
        self.parts = {part: outputs}
        into, out = ("row" if role == "row" else "replicate"), ("column" if role == "column" else "replicate")
        self.roles = {"A": into, "B": out, "A0": into, "B0": out, "magnitude": out}
        self.A = Factor(inputs, rank, 1 / math.sqrt(inputs))
        self.B = Factor(rank, outputs, 0.0, part=part, lr_ratio=config.lr_ratio)
        self.A0 = self.B0 = None
        self.settled = False  # whether the weight has lost it
        if config.init == "pissa":  # where A and B began, and what W has lost
            self.A0, self.B0 = Factor(inputs, rank, 0.0), Factor(rank, outputs, 0.0, part=part)
            self.A0.requires_grad_(False)
            self.B0.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        return y + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        return self.scale * self.B(self.A(F.dropout(x, self.dropout, self.training)))  # type: ignore[no-any-return]

    def delta(self) -> Tensor:
        """s B A, in float32."""
        return self.scale * (wide(self.B.weight) @ wide(self.A.weight))

    def merged(self, weight_OI: Tensor) -> Tensor:
        """The weight (float32) with the update in it."""
        return (weight_OI if self.settled else weight_OI - self.origin()) + self.delta()

    def origin(self) -> Tensor | float:
        """What the weight loses at the start."""
        if self.A0 is None or self.B0 is None:
            return 0.0
        return self.scale * (wide(self.B0.weight) @ wide(self.A0.weight))  # type: ignore[no-any-return]


class DoRA(LoRA):
    """magnitude * (W + s B A) / |W + s B A|, norms by row, through which no gradient flows (paper, section 4.3)."""

    def __init__(self, inputs: int, outputs: int, rank: int, role: Role, part: str, config: FinetuneConfig):
        super().__init__(inputs, outputs, rank, role, part, config)
        self.magnitude = nn.Parameter(torch.empty(outputs))

    def initial(self, name: str, uniform: Tensor) -> Tensor:
        return torch.ones_like(uniform)  # of no use: the weight's norms, once there is a weight

    def forward(self, x: Tensor, y: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ratio_O = self.magnitude / self.norm(weight())
        return ratio_O.to(y.dtype) * (y + self.update(x))

    @torch.no_grad()
    def norm(self, weight_OI: Tensor) -> Tensor:
        """|W + s B A| by row, from products with A and B alone: the sum is never formed.  -> float32"""
        weight_OI, A_RI, B_OR = wide(weight_OI), wide(self.A.weight), wide(self.B.weight)
        cross_O = ((weight_OI @ A_RI.t()) * B_OR).sum(1)
        own_O = ((B_OR @ (A_RI @ A_RI.t())) * B_OR).sum(1)
        square_O = weight_OI.square().sum(1) + 2 * self.scale * cross_O + self.scale**2 * own_O
        if self.peers is not None and self.role == "row":  # others have the other columns
            square_O = total(square_O, self.peers)
        return square_O.clamp(min=0).sqrt()

    def merged(self, weight_OI: Tensor) -> Tensor:
        weight_OI = weight_OI + self.delta()
        return weight_OI * (wide(self.magnitude) / weight_OI.norm(dim=1))[:, None]


class GroupedLoRA(nn.Module):
    """The same for every expert.  x_NI, y_NO, ends_E -> y_NO"""

    roles = {"A": "expert", "B": "expert"}

    def __init__(self, like: GroupedLinear, outputs: int, rank: int, config: FinetuneConfig):
        super().__init__()
        inputs = like.weight.shape[2]
        self.rank, self.dropout = rank, config.dropout
        self.alpha, self.scale = config.alpha, config.alpha / (math.sqrt(rank) if config.rs else rank)
        into: Literal["row", "replicate"] = "row" if like.alone == "row" else "replicate"
        out: Literal["column", "replicate"] = "column" if like.alone == "column" else "replicate"
        self.A = GroupedFactor(like, inputs, rank, 1 / math.sqrt(inputs), into)
        self.B = GroupedFactor(like, rank, outputs, 0.0, out, lr_ratio=config.lr_ratio)

    def forward(self, x_NI: Tensor, y_NO: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
        hidden_NR = self.A(F.dropout(x_NI, self.dropout, self.training), ends_E, tail=tail)
        return y_NO + self.scale * self.B(hidden_NR, ends_E, tail=tail)  # type: ignore[no-any-return]

    def merged(self, weight_EOI: Tensor) -> Tensor:
        return weight_EOI + self.scale * (wide(self.B.weight) @ wide(self.A.weight))
