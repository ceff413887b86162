# mypy: disable-error-code="no-untyped-def"
"""Norms in Triton. A program holds whole rows in registers, so each number is read once and written once.

Backward: a program goes through many rows, and keeps the gradient of the weight it has seen so far in registers. Those
parts, one of each program, are added up by a second small kernel: no atomics, so the same sum each time.
Without a mean it is the root-mean-square norm.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.launch import blocks, programs, rows_of

WIDEST = 32768
BACKWARD = 2048, 8  # numbers of a program, at least, and of a thread: fewer, with up to five rows of numbers to hold


@triton.jit
def _forward(
    X, RESIDUAL, WEIGHT, BIAS, Y, SUM, MEAN, RSTD, rows, columns, eps, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    x = tl.load(X + at, inside, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + at, inside, other=0.0).to(tl.float32)
        x = x.to(SUM.dtype.element_ty)
        tl.store(SUM + at, x, inside)
        x = x.to(tl.float32)
    weight = tl.load(WEIGHT + column, column < columns, other=0.0)
    weight = weight.to(Y.dtype.element_ty).to(tl.float32) + offset
    if MEAN is not None:
        mean = tl.sum(x, 1, keep_dims=True) / columns
        tl.store(MEAN + row, mean, row < rows)
        x = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + eps)
    tl.store(RSTD + row, rstd, row < rows)
    y = x * rstd * weight
    if BIAS is not None:
        bias = tl.load(BIAS + column, column < columns, other=0.0)
        y += bias.to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), inside)


@triton.jit
def _backward(
    DY, DSUM, X, WEIGHT, MEAN, RSTD, DX, PARTS, BIAS_PARTS, rows, columns, offset, tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(WEIGHT + column, column < columns, other=0.0)
    weight = weight.to(X.dtype.element_ty).to(tl.float32) + offset
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        at = row.to(tl.int64) * columns + column
        dy = tl.load(DY + at, inside, other=0.0).to(tl.float32)
        normed = tl.load(X + at, inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, row < rows, other=0.0)
        if MEAN is not None:
            normed -= tl.load(MEAN + row, row < rows, other=0.0)
            dbias += dy
        normed = tl.where(inside, normed * rstd, 0.0)
        dweight += dy * normed
        dy *= weight
        dx = dy - normed * (tl.sum(dy * normed, 1, keep_dims=True) / columns)
        if MEAN is not None:
            dx -= tl.sum(dy, 1, keep_dims=True) / columns
        dx *= rstd
        if DSUM is not None:
            dx += tl.load(DSUM + at, inside, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), inside)
    at = tl.program_id(0) * columns + column
    tl.store(PARTS + at, tl.sum(dweight, 0, keep_dims=True), column < columns)
    if BIAS_PARTS is not None:
        tl.store(BIAS_PARTS + at, tl.sum(dbias, 0, keep_dims=True), column < columns)


def unsupported(x: Tensor, *_: Any) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32"
    return f"rows of more than {WIDEST} numbers" if x.shape[-1] > WIDEST else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = _normed(x, None, weight, None, eps, offset, centred=False)
    return y, rstd


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    normed, total, _, rstd = _normed(x, y, weight, None, eps, offset, centred=False)
    return normed, total, rstd


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _normed(x, None, weight, bias, eps, 0.0, centred=True)
    return y, mean, rstd


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Any, Any, Tensor]:
    x_ND = rows_of(x)
    rows, columns = x_ND.shape
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    total = None if residual is None else x.new_empty(x.shape)
    residual = None if residual is None else rows_of(residual)
    ROWS, BLOCK, warps = blocks(columns)
    tensors = x_ND, residual, weight, bias, y, total, mean, rstd
    grid = (triton.cdiv(rows, ROWS),)
    _forward[grid](*tensors, rows, columns, eps, offset, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps)
    return y, total, mean, rstd


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = _gradients(dy, dsum, x, weight, None, rstd, offset)
    return dx, dweight


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dy, None, x, weight, mean, rstd, 0.0)


def _gradients(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor, Any]:
    dy, x_ND, dsum = rows_of(dy), rows_of(x), None if dsum is None else rows_of(dsum)
    rows, columns = x_ND.shape
    ROWS, BLOCK, warps = blocks(columns, *BACKWARD)
    tiles = triton.cdiv(rows, ROWS)
    count = programs(x, tiles, warps)
    dx, parts = x.new_empty(x.shape), x.new_empty(count, columns, dtype=torch.float32)
    bias_parts = None if mean is None else torch.empty_like(parts)
    tensors = dy, dsum, x_ND, weight, mean, rstd, dx, parts, bias_parts
    _backward[(count,)](*tensors, rows, columns, offset, tiles, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps)
    dbias = None if bias_parts is None else bias_parts.sum(0).to(weight.dtype)
    return dx, parts.sum(0).to(weight.dtype), dbias
