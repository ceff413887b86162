# mypy: disable-error-code="no-untyped-def"
"""Norms in Triton. A program holds whole rows in registers, so each number is read once and written once.

Backward: a program goes through many rows, and keeps the gradient of the weight it has seen so far in registers. Those
parts, one of each program, are added up by a second small kernel: no atomics, so the same sum each time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.launch import blocks, programs, rows_of

WIDEST = 32768


@triton.jit
def _rms_forward(
    X, RESIDUAL, WEIGHT, Y, SUM, RSTD, rows, columns, eps, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr
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
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + eps)
    tl.store(RSTD + row, rstd, row < rows)
    tl.store(Y + at, (x * rstd * weight).to(Y.dtype.element_ty), inside)


@triton.jit
def _rms_backward(
    DY, DSUM, X, WEIGHT, RSTD, DX, PARTS, rows, columns, offset, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(WEIGHT + column, column < columns, other=0.0)
    weight = weight.to(X.dtype.element_ty).to(tl.float32) + offset
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        at = row.to(tl.int64) * columns + column
        dy = tl.load(DY + at, inside, other=0.0).to(tl.float32)
        x = tl.load(X + at, inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, row < rows, other=0.0)
        normed = x * rstd
        dweight += dy * normed
        dy *= weight
        dx = rstd * (dy - normed * (tl.sum(dy * normed, 1, keep_dims=True) / columns))
        if DSUM is not None:
            dx += tl.load(DSUM + at, inside, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), inside)
    total = tl.sum(dweight, 0, keep_dims=True)
    tl.store(PARTS + tl.program_id(0) * columns + column, total, column < columns)


def unsupported(x: Tensor, *_: Any) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32"
    return f"rows of more than {WIDEST} numbers" if x.shape[-1] > WIDEST else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _normed(x, None, weight, eps, offset)
    return y, rstd


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    return _normed(x, y, weight, eps, offset)


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Any, Tensor]:
    x_ND = rows_of(x)
    rows, columns = x_ND.shape
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if residual is None else x.new_empty(x.shape)
    residual = None if residual is None else rows_of(residual)
    ROWS, BLOCK, warps = blocks(columns)
    grid = (triton.cdiv(rows, ROWS),)
    _rms_forward[grid](
        x_ND, residual, weight, y, total, rstd, rows, columns, eps, offset, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps
    )
    return y, total, rstd


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    dy, x_ND, dsum = rows_of(dy), rows_of(x), None if dsum is None else rows_of(dsum)
    rows, columns = x_ND.shape
    ROWS, BLOCK, warps = blocks(columns)
    tiles = triton.cdiv(rows, ROWS)
    count = programs(x, tiles, warps)
    dx, parts = x.new_empty(x.shape), x.new_empty(count, columns, dtype=torch.float32)
    _rms_backward[(count,)](
        dy, dsum, x_ND, weight, rstd, dx, parts, rows, columns, offset, tiles, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps
    )
    return dx, parts.sum(0).to(weight.dtype)
