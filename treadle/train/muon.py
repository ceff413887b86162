"""Muon: momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

R rows, C columns of a weight matrix; an expert weight is a stack of matrices, one per expert.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from treadle.parallel.matrices import on_whole_matrices
from treadle.parallel.shards import local, pieces, spread_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic whose steep slope at 0 lifts small singular values fast


class Muon(torch.optim.Optimizer):
    """Steps matrices, and stacks of matrices each by itself, along the orthogonal factor of their momentum.

    A group's `parts` are the row counts of projections that are stacked in one parameter: each is orthogonalised by
    itself, as if it were a parameter of its own. torch.optim.Muon knows no parts; without them both agree.

    device: where matrices are orthogonalised, if not where they lie.
    Momentum is spread as the parameter is; `treadle.parallel.matrices` brings together what has to be whole.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        device: torch.device | None = None,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "iterations": iterations,
            "parts": (),
        }
        super().__init__(list(groups), defaults)
        self.device = device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        stepped = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        updates = [self._momentum(parameter, group) for parameter, group in stepped]

        def orthogonal(number: int, whole_RC: Tensor) -> Tensor:
            group = stepped[number][1]
            pieces = whole_RC.to(self.device or whole_RC.device).split(_parts(group, whole_RC), -2)
            found = torch.cat([orthogonalise(piece_RC, group["iterations"]) for piece_RC in pieces], -2)
            return found.to(whole_RC.device)

        parts = [group["parts"] for _, group in stepped]
        directions = on_whole_matrices([parameter for parameter, _ in stepped], updates, parts, orthogonal)
        for (parameter, group), direction in zip(stepped, directions, strict=True):
            self._move(parameter, direction, group)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """What is to be orthogonalised, of the rows that are here, in the dtype that it is orthogonalised in."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        grad_RC = local(parameter.grad)
        momentum_RC = local(state["momentum"]).lerp_(grad_RC, 1 - group["momentum"])
        return (grad_RC.lerp(momentum_RC, group["momentum"]) if group["nesterov"] else momentum_RC).bfloat16()

    def _move(self, parameter: Tensor, direction_RC: Tensor, group: dict[str, Any]) -> None:
        local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
        spread = spread_like(direction_RC, parameter)
        for here, direction in zip(pieces(parameter, group["parts"]), pieces(spread, group["parts"]), strict=True):
            start = 0
            for rows in _parts(group, parameter):
                # 0.2 sqrt(max(R, C)) gives the update the root mean square of a typical AdamW step.
                scale = 0.2 * math.sqrt(max(rows, parameter.shape[-1]))
                target, moved = (p.within(start, start + rows, parameter.ndim - 2).values for p in (here, direction))
                target.add_(moved.to(target.dtype), alpha=-group["lr"] * scale)
                start += rows


def _parts(group: dict[str, Any], whole_RC: Tensor) -> list[int]:
    return list(group["parts"]) or [whole_RC.shape[-2]]


def orthogonalise(x_RC: Tensor, iterations: int = 5) -> Tensor:
    """Roughly U V^T of the singular value decomposition: singular values end between about 0.7 and 1.2.  bf16

    A 3-D tensor is a stack of matrices.
    """
    a, b, c = COEFFICIENTS
    addmm = torch.addmm if x_RC.ndim == 2 else torch.baddbmm
    x = x_RC.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = addmm(x, addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
