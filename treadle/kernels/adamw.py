"""One step of AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) on one tensor, in place, with clipping."""

import math
from typing import Any

import torch
from torch import Tensor

from treadle.kernels.operation import Floor, Operation, Shape, nbytes


@torch.no_grad()
def adamw_step(
    parameter: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """Step a parameter and its moments in place.

    mean, square: the moments of the gradient, float32, zeros before step 1. scale: a scalar on the device that the
    gradient is multiplied with as it is read, such as the factor of clipping by norm; None is one.
    """
    first, second = 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
    tensors = parameter, grad, mean, square, scale
    torch.ops.treadle.adamw_step(*tensors, lr / first, second, *betas, eps, 1 - lr * weight_decay)


def _adamw_step(
    parameter: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    scale: Tensor | None,
    rate: float,
    root_correction: float,
    beta1: float,
    beta2: float,
    eps: float,
    keep: float,
) -> None:
    grad = grad.to(mean.dtype)
    if scale is not None:
        grad = grad * scale
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = mean / (square.sqrt() / root_correction + eps)
    parameter.copy_(parameter.to(mean.dtype) * keep - rate * update)


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    parameter, grad = (torch.randn(*shape, dtype=dtype, device=device) for _ in range(2))
    mean, square = torch.randn(*shape, device=device) * 0.1, torch.rand(*shape, device=device) * 0.1
    return parameter, grad, mean, square, torch.full((), 0.5, device=device), 1e-2, 0.7, 0.9, 0.95, 1e-8, 0.99


ADAMW = Operation(
    name="adamw_step",
    schema="(Tensor(a!) parameter, Tensor grad, Tensor(b!) mean, Tensor(c!) square, Tensor? scale, float rate, "
    "float root_correction, float beta1, float beta2, float eps, float keep) -> ()",
    module=__name__,
    reference=_adamw_step,
    fake=lambda *_: None,
    floor=lambda p, grad, mean, square, *_: Floor(2 * nbytes(p, mean, square) + nbytes(grad), 15 * p.numel()),
    arguments=_arguments,
    checked=((7,), (33, 70), (2, 4096)),
    timed=((2048, 16384), (2048,)),
    timed_dtypes=(torch.float32,),
)
