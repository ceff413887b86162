# mypy: disable-error-code="no-untyped-def"
"""Row-wise fp8 in Triton: a program holds whole rows, so they are read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.launch import blocks, rows_of

WIDEST = 32768


@triton.jit
def _quantise(X, Q, SCALE, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    x = tl.load(X + at, inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1, keep_dims=True), 1e-12) / 448.0
    tl.store(SCALE + row, scale, row < rows)
    q = tl.minimum(tl.maximum(tl.div_rn(x, tl.broadcast_to(scale, x.shape)), -448.0), 448.0)
    tl.store(Q + at, q.to(tl.float8e4nv), inside)


def unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "this GPU has no fp8"
    return f"rows of more than {WIDEST} numbers" if x.shape[-1] > WIDEST else None


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x_ND = rows_of(x)
    rows, columns = x_ND.shape
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    ROWS, BLOCK, warps = blocks(columns)
    grid = (triton.cdiv(rows, ROWS),)
    _quantise[grid](x_ND, q, scale, rows, columns, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps)
    return q, scale
