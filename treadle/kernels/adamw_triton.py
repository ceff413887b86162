# mypy: disable-error-code="no-untyped-def"
"""AdamW in Triton: parameter, gradient and moments each pass through once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4


@triton.jit
def _step(P, GRAD, MEAN, SQUARE, SCALE, size, rate, root_correction, beta1, beta2, eps, keep, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    p = tl.load(P + at, inside, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + at, inside, other=0.0).to(tl.float32)
    mean, square = tl.load(MEAN + at, inside, other=0.0), tl.load(SQUARE + at, inside, other=0.0)
    if SCALE is not None:
        grad *= tl.load(SCALE).to(tl.float32)
    mean = mean + (grad - mean) * (1 - beta1)
    square = square * beta2 + grad * grad * (1 - beta2)
    p = p * keep - rate * mean / (tl.sqrt(square) / root_correction + eps)
    tl.store(P + at, p.to(P.dtype.element_ty), inside)
    tl.store(MEAN + at, mean, inside)
    tl.store(SQUARE + at, square, inside)


def unsupported(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *_: Any) -> str | None:
    if mean.dtype != torch.float32 or square.dtype != torch.float32:
        return "its moments are not in float32"
    return "its tensors are not contiguous" if not all(map(_dense, (parameter, mean, square))) else None


def _dense(x: Tensor) -> bool:
    return x.is_contiguous()


def adamw_step(
    parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor | None, *numbers: float
) -> None:
    size = parameter.numel()
    tensors = parameter, grad.contiguous(), mean, square, scale
    _step[(triton.cdiv(size, BLOCK),)](*tensors, size, *numbers, BLOCK=BLOCK, num_warps=WARPS)
