# mypy: disable-error-code="no-untyped-def"
"""Rows of a mixture in Triton: a program takes a token, whose row is read or written once for all of its experts."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.launch import power_of_two

MOST_EXPERTS, WIDEST = 32, 16384
BLOCK, WARPS = 2048, 4


@triton.jit
def _spread(X, INVERSE, ROWS, T, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + token * D + column, column < D)
    for k in tl.static_range(K):
        place = tl.load(INVERSE + k * T + token)
        tl.store(ROWS + place * D + column, x, column < D)


@triton.jit
def _combine(ROWS, WEIGHTS, INVERSE, Y, T, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(INVERSE + k * T + token)
        row = tl.load(ROWS + place * D + column, column < D, other=0.0).to(tl.float32)
        if WEIGHTS is not None:
            row *= tl.load(WEIGHTS + token * K + k).to(ROWS.dtype.element_ty).to(tl.float32)
        y += row
    tl.store(Y + token * D + column, y.to(Y.dtype.element_ty), column < D)


@triton.jit
def _combine_backward(DY, ROWS, WEIGHTS, INVERSE, DROWS, DWEIGHTS, T, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    dy = tl.load(DY + token * D + column, column < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(INVERSE + k * T + token)
        row = tl.load(ROWS + place * D + column, column < D, other=0.0).to(tl.float32)
        tl.store(DWEIGHTS + token * K + k, tl.sum(row * dy, 0))
        weight = tl.load(WEIGHTS + token * K + k).to(ROWS.dtype.element_ty).to(tl.float32)
        tl.store(DROWS + place * D + column, (weight * dy).to(DROWS.dtype.element_ty), column < D)


def unsupported(x: Tensor, *args: Any) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32"
    if x.shape[-1] > WIDEST:
        return f"rows of more than {WIDEST} numbers"
    rows = max((arg.shape[0] for arg in (x, *args) if isinstance(arg, Tensor)), default=0)
    tokens = next((arg for arg in args if isinstance(arg, int)), x.shape[0])
    return f"more than {MOST_EXPERTS} experts for a token" if rows > MOST_EXPERTS * tokens else None


def spread_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    x, (T, D), N = x.contiguous(), x.shape, order.shape[0]
    rows = x.new_empty(N, D)
    _spread[(T, triton.cdiv(D, BLOCK))](x, inverse, rows, T, D, K=N // T, BLOCK=BLOCK, num_warps=WARPS)
    return rows


def combine_rows(rows: Tensor, weights: Tensor | None, inverse: Tensor, tokens: int) -> Tensor:
    rows, (N, D) = rows.contiguous(), rows.shape
    y = rows.new_empty(tokens, D)
    weights = None if weights is None else weights.contiguous()
    grid = (tokens, triton.cdiv(D, BLOCK))
    _combine[grid](rows, weights, inverse, y, tokens, D, K=N // tokens, BLOCK=BLOCK, num_warps=WARPS)
    return y


def combine_rows_backward(dy: Tensor, rows: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    dy, rows, weights, (T, D) = dy.contiguous(), rows.contiguous(), weights.contiguous(), dy.shape
    drows, dweights = torch.empty_like(rows), torch.empty_like(weights)
    block = power_of_two(D)
    warps = max(1, min(16, block // 512))
    tensors = dy, rows, weights, inverse, drows, dweights
    _combine_backward[(T,)](*tensors, T, D, K=weights.shape[1], BLOCK=block, num_warps=warps)
    return drows, dweights
