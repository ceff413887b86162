# mypy: disable-error-code="no-untyped-def, valid-type"
"""The root-mean-square norm in TileLang: a block holds whole rows in registers, each number is read and written once.

N rows, D numbers each.
"""

from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from treadle.kernels.launch import TILE, aligned
from treadle.kernels.tiles import DTYPES, compiled

WIDEST = 16384


def forward(D: int, dtype: str, weight_dtype: str, rows: int, threads: int):
    N = T.dynamic("N")

    @T.prim_func
    def rms_norm(
        X: T.Tensor((N, D), dtype),
        WEIGHT: T.Tensor((D,), weight_dtype),
        Y: T.Tensor((N, D), dtype),
        RSTD: T.Tensor((N,), "float32"),
        eps: T.float32,
        offset: T.float32,
    ):
        with T.Kernel(T.ceildiv(N, rows), threads=threads) as block:
            x = T.alloc_fragment((rows, D), dtype)
            squares = T.alloc_fragment((rows, D), "float32")
            rstd = T.alloc_fragment((rows,), "float32")
            T.copy(X[block * rows, 0], x)
            for i, j in T.Parallel(rows, D):
                squares[i, j] = T.cast(x[i, j], "float32") * T.cast(x[i, j], "float32")
            T.reduce_sum(squares, rstd, dim=1)
            for i in T.Parallel(rows):
                rstd[i] = T.rsqrt(rstd[i] / D + eps)
            T.copy(rstd, RSTD[block * rows])
            for i, j in T.Parallel(rows, D):
                weight = T.cast(T.cast(WEIGHT[j], dtype), "float32") + offset
                x[i, j] = T.cast(x[i, j], "float32") * rstd[i] * weight
            T.copy(x, Y[block * rows, 0])

    return rms_norm


def _sizes(x: Tensor) -> tuple[int, int] | None:
    """Rows and threads of a block, if they come out even: each thread loads some vectors of 16 bytes, at least two."""
    D, rows = x.shape[-1], max(1, TILE // x.shape[-1])
    vectors, rest = divmod(rows * D * x.element_size(), 16)
    threads = next((n for n in (512, 256, 128, 64) if vectors % (2 * n) == 0), None)
    return None if rest or threads is None or D % 64 else (rows, threads)


def unsupported(x: Tensor, *args: Any) -> str | None:
    if x.dtype not in DTYPES:
        return "it computes in float32"
    if x.shape[-1] > WIDEST:
        return f"rows of more than {WIDEST} numbers"
    return None if _sizes(x) else f"rows of {x.shape[-1]} numbers cannot be dealt evenly to threads"


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        kernel = compiled(forward, x.shape[-1], DTYPES[x.dtype], DTYPES[weight.dtype], *(_sizes(x) or ()))
        x_ND, D = aligned(x), x.shape[-1]
        kernel(x_ND.view(-1, D), aligned(weight), y.view(-1, D), rstd.view(-1), eps, offset)
    return y, rstd
