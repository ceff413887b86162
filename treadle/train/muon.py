"""Muon: momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

R rows, C columns of a weight matrix; an expert weight is a stack of matrices, one per expert.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic whose steep slope at 0 lifts small singular values fast


class Muon(torch.optim.Optimizer):
    """Steps matrices, and stacks of matrices each by itself, along the orthogonal factor of their momentum.

    A group's `parts` are the row counts of projections that are stacked in one parameter: each is orthogonalised by
    itself, as if it were a parameter of its own. torch.optim.Muon knows no parts; without them both agree.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum_RC = state["momentum"].lerp_(grad, 1 - group["momentum"])
        update_RC = grad.lerp(momentum_RC, group["momentum"]) if group["nesterov"] else momentum_RC
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parts = list(group["parts"]) or [parameter.shape[-2]]
        for target, piece in zip(parameter.split(parts, -2), update_RC.split(parts, -2), strict=True):
            # 0.2 sqrt(max(R, C)) gives the update the root mean square of a typical AdamW step.
            scale = 0.2 * math.sqrt(max(piece.shape[-2:]))
            target.add_(orthogonalise(piece, group["iterations"]).to(target.dtype), alpha=-group["lr"] * scale)


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
