"""Root-mean-square and layer norm over the last dimension, alone or of the sum with a residual stream.

N rows (of all leading dimensions), D numbers each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from treadle.kernels.operation import Floor, Gradient, Operation, Shape, nbytes


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float32, of a weight rounded to x's dtype.  x_..D -> y_..D

    weight_D in any float dtype, in which it gets its gradient; or weight_HD for x_..HD, a weight for each head. With an
    offset the factor stays in float32, as Gemma's: rounded to bf16, a weight near zero would lose its digits.
    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if weight.ndim == 1 and RMS_NORM.worthwhile(x, weight, eps, offset):
        return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-any-return]
    return rms_norm_definition(x, weight, eps, offset)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """x + y, and its norm.  x_..D, y_..D -> normed_..D, sum_..D"""
    if weight.ndim == 1 and ADD_RMS_NORM.worthwhile(x, y, weight, eps, offset):
        return _AddRMSNorm.apply(x, y, weight, eps, offset)  # type: ignore[no-any-return]
    return _add_rms_norm(x, y, weight, eps, offset)


def _add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return rms_norm_definition(total, weight, eps, offset), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32.  x_..D -> y_..D

    weight_D and bias_D as in `rms_norm`, or neither (OLMo 1), or weight_HD and bias_HD. Ba et al. 2016, 1607.06450.
    """
    if weight is not None and weight.ndim == 1 and LAYER_NORM.worthwhile(x, weight, bias, eps):
        return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
    return _layer_norm(x, weight, bias, eps)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, bias))
    if weight is not None and weight.ndim == 2:
        scaled = F.layer_norm(x, x.shape[-1:], eps=eps) * weight
        return scaled if bias is None else scaled + bias
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    weight = weight.to(x.dtype)
    if offset != 0.0:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm_definition(x.to(wide), weight.to(wide) + offset, eps, 0.0).to(x.dtype)
    if weight.ndim == 2:
        return F.rms_norm(x, weight.shape[1:], None, eps) * weight
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, rstd = torch.ops.treadle.rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.numbers = eps, offset
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dx, dweight = torch.ops.treadle.rms_norm_backward(grads[0], None, *ctx.saved_tensors, *ctx.numbers)
        return dx, dweight, None, None


class _AddRMSNorm(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        normed, total, rstd = torch.ops.treadle.add_rms_norm(x, y, weight, eps, offset)
        ctx.save_for_backward(total, weight, rstd)
        ctx.numbers = eps, offset
        return normed, total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dx, dweight = torch.ops.treadle.rms_norm_backward(*grads, *ctx.saved_tensors, *ctx.numbers)
        return dx, dx, dweight, None, None


class _LayerNorm(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.treadle.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.numbers, ctx.biased = (eps,), bias is not None
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = torch.ops.treadle.layer_norm_backward(grads[0], *ctx.saved_tensors, *ctx.numbers)
        return dx, dweight, dbias if ctx.biased else None, None


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.square().mean(-1) + eps).rsqrt()


def _fake_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _rms_norm_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x = torch.randn(*shape, dtype=dtype, device=device)
    return x, torch.rand(shape[-1], device=device) + 0.5, 1e-5, 0.0


def _add_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, *rest = _rms_norm_arguments(shape, dtype, device)
    return x, torch.randn_like(x), *rest


def _backward_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Of a shape (1, N, D) with a gradient of the sum, of (N, D) without."""
    x, weight, eps, offset = _rms_norm_arguments(shape, dtype, device)
    dsum = torch.randn_like(x) if len(shape) > 2 else None
    return torch.randn_like(x), dsum, x, weight, _inverse_root(x, eps), eps, offset


def _backward_pieces(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, offset: float
) -> tuple[Any, tuple[Tensor, ...], Any]:
    if dsum is None:
        return lambda x, weight: rms_norm_definition(x, weight, eps, offset), (x, weight), dy
    return lambda x, weight: (rms_norm_definition(x, weight, eps, offset), x.clone()), (x, weight), (dy, dsum)


CHECKED = ((1, 8), (37, 300), (3, 5, 128), (2, 4096), (1, 3, 8200))
TIMED = ((16384, 2048), (16384, 4096), (16384, 8192), (256, 4096))

RMS_NORM = Operation(
    name="rms_norm",
    schema="(Tensor x, Tensor weight, float eps, float offset) -> (Tensor y, Tensor rstd)",
    module=__name__,
    reference=lambda x, weight, eps, offset: (rms_norm_definition(x, weight, eps, offset), _inverse_root(x, eps)),
    plain=rms_norm_definition,
    fake=lambda x, weight, eps, offset: (x.new_empty(x.shape), _fake_rows(x)),
    floor=lambda x, weight, eps, offset: Floor(nbytes(x, x, weight) + 4 * x[..., 0].numel(), 4 * x.numel()),
    arguments=_rms_norm_arguments,
    checked=CHECKED,
    timed=(*TIMED, (16384, 32, 128)),
)

ADD_RMS_NORM = Operation(
    name="add_rms_norm",
    schema="(Tensor x, Tensor y, Tensor weight, float eps, float offset) -> (Tensor normed, Tensor sum, Tensor rstd)",
    module=__name__,
    reference=lambda x, y, weight, eps, offset: (
        *_add_rms_norm(x, y, weight, eps, offset),
        _inverse_root(x + y, eps),
    ),
    plain=_add_rms_norm,
    fake=lambda x, y, weight, eps, offset: (x.new_empty(x.shape), x.new_empty(x.shape), _fake_rows(x)),
    floor=lambda x, y, weight, eps, offset: Floor(
        2 * nbytes(x, y) + nbytes(weight) + 4 * x[..., 0].numel(), 5 * x.numel()
    ),
    arguments=_add_arguments,
    checked=CHECKED,
    timed=TIMED,
)

Operation(
    name="rms_norm_backward",
    schema="(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd, float eps, float offset)"
    " -> (Tensor dx, Tensor dweight)",
    module=__name__,
    reference=Gradient(_backward_pieces),
    fake=lambda dy, dsum, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    floor=lambda dy, dsum, x, weight, rstd, *_: Floor(nbytes(dy, dsum, x, dy, weight, weight, rstd), 10 * x.numel()),
    arguments=_backward_arguments,
    checked=CHECKED,
    timed=(*TIMED, (1, 16384, 4096)),
)


def _layer_norm_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, weight, eps, _ = _rms_norm_arguments(shape, dtype, device)
    return x + 0.5, weight, torch.randn_like(weight), eps


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1)
    return mean, _inverse_root(wide - mean[..., None], eps)


def _layer_norm_backward_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, weight, _, eps = _layer_norm_arguments(shape, dtype, device)
    return torch.randn_like(x), x, weight, *_moments(x, eps), eps


def _layer_norm_pieces(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Any, tuple[Tensor, ...], Any]:
    return lambda x, weight, bias: _layer_norm(x, weight, bias, eps), (x, weight, torch.zeros_like(weight)), dy


LAYER_NORM = Operation(
    name="layer_norm",
    schema="(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    module=__name__,
    reference=lambda x, weight, bias, eps: (_layer_norm(x, weight, bias, eps), *_moments(x, eps)),
    plain=_layer_norm,
    fake=lambda x, weight, bias, eps: (x.new_empty(x.shape), _fake_rows(x), _fake_rows(x)),
    floor=lambda x, weight, bias, eps: Floor(nbytes(x, x, weight, bias) + 8 * x[..., 0].numel(), 7 * x.numel()),
    arguments=_layer_norm_arguments,
    checked=CHECKED,
    timed=TIMED,
)

Operation(
    name="layer_norm_backward",
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    module=__name__,
    reference=Gradient(_layer_norm_pieces),
    fake=lambda dy, x, weight, *_: (x.new_empty(x.shape), *(weight.new_empty(weight.shape) for _ in range(2))),
    floor=lambda dy, x, weight, mean, rstd, eps: Floor(
        nbytes(dy, x, dy, mean, rstd) + 3 * nbytes(weight), 14 * x.numel()
    ),
    arguments=_layer_norm_backward_arguments,
    checked=CHECKED,
    timed=TIMED,
)
