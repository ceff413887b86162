# mypy: disable-error-code="no-untyped-def"
"""Rows into two buffers in Triton: a program takes one row of one of them."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _row(A, X, place, row, size, stride, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + i, i < size)
        tl.store(A + place * size + i, x.to(A.dtype.element_ty), i < size)


@triton.jit
def _store(A, B, X, Y, PLACES, a_size, b_size, x_stride, y_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(PLACES + row)
    if tl.program_id(1) == 0:
        _row(A, X, place, row, a_size, x_stride, BLOCK)
    else:
        _row(B, Y, place, row, b_size, y_stride, BLOCK)


def unsupported(a: Tensor, b: Tensor, x: Tensor, y: Tensor, places: Tensor) -> str | None:
    if not (a.is_contiguous() and b.is_contiguous() and x.stride(1) == y.stride(1) == 1):
        return "buffers or rows do not lie number by number"
    return None


def store_rows(a: Tensor, b: Tensor, x: Tensor, y: Tensor, places: Tensor) -> None:
    sizes = a.shape[1], b.shape[1], x.stride(0), y.stride(0)
    if len(places):
        _store[(len(places), 2)](a, b, x, y, places, *sizes, BLOCK=BLOCK, num_warps=4)
