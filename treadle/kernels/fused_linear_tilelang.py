# mypy: disable-error-code="no-untyped-def, valid-type"
"""A linear map and what follows it in TileLang: wgmma on tiles that the copy engine (TMA) brings, some steps ahead.

N rows, D inputs, F outputs; n, d, f their tiles.
"""

import tilelang.language as T
import torch
from torch import Tensor

from treadle.kernels.launch import aligned
from treadle.kernels.tiles import DTYPES, compiled

TILES = {"n": 128, "f": 256, "d": 64, "stages": 4}
GATED = {"n": 128, "f": 128, "d": 64, "stages": 4}  # two tiles of the weight, and of sums


def activate(x, epilogue: str):
    if epilogue == "relu2":
        return T.max(x, 0) * T.max(x, 0)
    if epilogue == "gelu_tanh":
        return x / (1 + T.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return x if epilogue == "none" else x / (1 + T.exp(-x))


def plain(F: int, D: int, dtype: str, epilogue: str, biased: bool, n: int, f: int, d: int, stages: int):
    N = T.dynamic("N")

    @T.prim_func
    def fused_linear(
        X: T.Tensor((N, D), dtype),
        WEIGHT: T.Tensor((F, D), dtype),
        BIAS: T.Tensor((F,), "float32"),
        Y: T.Tensor((N, F), dtype),
    ):
        with T.Kernel(T.ceildiv(F, f), T.ceildiv(N, n), threads=256) as (column, row):
            x = T.alloc_shared((n, d), dtype)
            weight = T.alloc_shared((f, d), dtype)
            y = T.alloc_shared((n, f), dtype)
            total = T.alloc_fragment((n, f), "float32")
            T.use_swizzle(10)  # blocks that run at once share rows and columns, so that those stay in the L2 cache
            T.clear(total)
            for k in T.Pipelined(T.ceildiv(D, d), num_stages=stages):
                T.copy(X[row * n, k * d], x)
                T.copy(WEIGHT[column * f, k * d], weight)
                T.gemm(x, weight, total, transpose_B=True)
            if biased:
                bias = T.alloc_fragment((f,), "float32")
                T.copy(BIAS[column * f], bias)
                for i, j in T.Parallel(n, f):
                    total[i, j] += bias[j]
            for i, j in T.Parallel(n, f):
                total[i, j] = activate(total[i, j], epilogue)
            T.copy(total, y)
            T.copy(y, Y[row * n, column * f])

    return fused_linear


def gated(F: int, D: int, dtype: str, n: int, f: int, d: int, stages: int):
    N = T.dynamic("N")

    @T.prim_func
    def fused_linear_gated(X: T.Tensor((N, D), dtype), WEIGHT: T.Tensor((2 * F, D), dtype), Y: T.Tensor((N, F), dtype)):
        with T.Kernel(T.ceildiv(F, f), T.ceildiv(N, n), threads=256) as (column, row):
            x = T.alloc_shared((n, d), dtype)
            gate_weight = T.alloc_shared((f, d), dtype)
            up_weight = T.alloc_shared((f, d), dtype)
            y = T.alloc_shared((n, f), dtype)
            gate = T.alloc_fragment((n, f), "float32")
            up = T.alloc_fragment((n, f), "float32")
            T.use_swizzle(10)
            T.clear(gate)
            T.clear(up)
            for k in T.Pipelined(T.ceildiv(D, d), num_stages=stages):
                T.copy(X[row * n, k * d], x)
                T.copy(WEIGHT[column * f, k * d], gate_weight)
                T.copy(WEIGHT[F + column * f, k * d], up_weight)
                T.gemm(x, gate_weight, gate, transpose_B=True)
                T.gemm(x, up_weight, up, transpose_B=True)
            for i, j in T.Parallel(n, f):
                gate[i, j] = activate(gate[i, j], "silu") * up[i, j]
            T.copy(gate, y)
            T.copy(y, Y[row * n, column * f])

    return fused_linear_gated


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"it multiplies bf16 or fp16, not {x.dtype} and {weight.dtype}"
    if epilogue == "swiglu" and bias is not None:
        return "it has no bias with swiglu"
    if x.shape[-1] % 8 or weight.shape[0] % 16:
        return f"its sizes are multiples of 8, not {x.shape[-1]} inputs and {weight.shape[0]} outputs"
    return None


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str) -> Tensor:
    outputs, D = weight.shape
    F = outputs // 2 if epilogue == "swiglu" else outputs
    y = x.new_empty(*x.shape[:-1], F)
    if not x.numel():
        return y.zero_()
    tensors = aligned(x).view(-1, D), aligned(weight)
    if epilogue == "swiglu":
        compiled(gated, F, D, DTYPES[x.dtype], *GATED.values())(*tensors, y.view(-1, F))
        return y
    kernel = compiled(plain, F, D, DTYPES[x.dtype], epilogue, bias is not None, *TILES.values())
    some = weight.new_empty(F, dtype=torch.float32) if bias is None else aligned(bias.float())  # unread without a bias
    kernel(*tensors, some, y.view(-1, F))
    return y
