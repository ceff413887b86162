# mypy: disable-error-code="no-untyped-def, valid-type"
"""Causal attention in TileLang, for Hopper: one group of warps has the copy engine (TMA) fetch tiles, two multiply
(wgmma). Forward as FlashAttention (arXiv:2205.14135, with 2407.08608's division of labour).

The backward has a kernel for the gradient of the keys and values, which goes through the queries of all heads of the
group, and one for that of the queries. Scores are computed in both, which costs two matrix products of seven; in
return nothing is added up by atomics, so that gradients are the same each time.

B batch, S sequence, H heads, G key-value heads, K head dim; s and t tiles of queries and keys.
"""

from math import log
from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from treadle.kernels.causal_attention import unfit
from treadle.kernels.launch import aligned
from treadle.kernels.tiles import DTYPES, compiled

LOG_2 = log(2.0)
# Queries, keys, steps ahead. Of those that were checked on an H200 the fastest; see docs/benchmarks.md.
FORWARD = {64: (128, 128, 2), 128: (128, 128, 2)}
KEYS = {64: (64, 128, 2), 128: (64, 128, 2)}
QUERIES = {64: (128, 64, 2), 128: (128, 64, 2)}


def forward(H: int, G: int, K: int, dtype: str, s: int, t: int, stages: int):
    B, S = T.dynamic("B"), T.dynamic("S")

    @T.prim_func
    def causal_attention(
        Q: T.Tensor((B, S, H, K), dtype),
        KEYS: T.Tensor((B, S, G, K), dtype),
        VALUES: T.Tensor((B, S, G, K), dtype),
        OUT: T.Tensor((B, S, H, K), dtype),
        LOG_SUM: T.Tensor((B, H, S), "float32"),
        scale: T.float32,
    ):
        with T.Kernel(S // s, H, B, threads=256) as (tile, h, b):
            q = T.alloc_shared((s, K), dtype)
            k = T.alloc_shared((t, K), dtype)
            v = T.alloc_shared((t, K), dtype)
            scores = T.alloc_fragment((s, t), "float32")
            weights = T.alloc_fragment((s, t), dtype)
            out = T.alloc_fragment((s, K), "float32")
            top = T.alloc_fragment((s,), "float32")
            before = T.alloc_fragment((s,), "float32")
            shrink = T.alloc_fragment((s,), "float32")
            part = T.alloc_fragment((s,), "float32")
            total = T.alloc_fragment((s,), "float32")
            first = (S // s - 1 - tile) * s  # the longest rows begin first
            T.copy(Q[b, first : first + s, h, :], q)
            T.fill(out, 0)
            T.fill(total, 0)
            T.fill(top, -T.infinity("float32"))
            for n in T.Pipelined((first + s) // t, num_stages=stages):
                T.copy(KEYS[b, n * t : (n + 1) * t, h // (H // G), :], k)
                for i, j in T.Parallel(s, t):
                    scores[i, j] = T.if_then_else(first + i >= n * t + j, 0, -T.infinity("float32"))
                T.gemm(q, k, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                T.copy(VALUES[b, n * t : (n + 1) * t, h // (H // G), :], v)
                T.copy(top, before)
                T.reduce_max(scores, top, dim=1, clear=False)
                for i in T.Parallel(s):
                    top[i] = T.max(top[i], before[i])
                    shrink[i] = T.exp2((before[i] - top[i]) * scale)
                for i, j in T.Parallel(s, t):
                    scores[i, j] = T.exp2(scores[i, j] * scale - top[i] * scale)
                T.reduce_sum(scores, part, dim=1)
                for i in T.Parallel(s):
                    total[i] = total[i] * shrink[i] + part[i]
                for i, j in T.Parallel(s, K):
                    out[i, j] *= shrink[i]
                T.copy(scores, weights)
                T.gemm(weights, v, out, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(s, K):
                out[i, j] /= total[i]
            T.copy(out, q)
            T.copy(q, OUT[b, first : first + s, h, :])
            for i in T.Parallel(s):
                total[i] = (T.log2(total[i]) + top[i] * scale) * LOG_2
            T.copy(total, LOG_SUM[b, h, first : first + s])

    return causal_attention


def rows(H: int, K: int, dtype: str):
    """Of each query: the output times its gradient, and the logarithm to base 2 of its sum."""
    B, S = T.dynamic("B"), T.dynamic("S")
    s = 64

    @T.prim_func
    def causal_attention_rows(
        OUT: T.Tensor((B, S, H, K), dtype),
        DOUT: T.Tensor((B, S, H, K), dtype),
        LOG_SUM: T.Tensor((B, H, S), "float32"),
        DELTA: T.Tensor((B, H, S), "float32"),
        LOG2_SUM: T.Tensor((B, H, S), "float32"),
    ):
        with T.Kernel(S // s, H, B, threads=128) as (tile, h, b):
            out = T.alloc_fragment((s, K), dtype)
            dout = T.alloc_fragment((s, K), dtype)
            product = T.alloc_fragment((s, K), "float32")
            delta = T.alloc_fragment((s,), "float32")
            T.copy(OUT[b, tile * s : (tile + 1) * s, h, :], out)
            T.copy(DOUT[b, tile * s : (tile + 1) * s, h, :], dout)
            for i, j in T.Parallel(s, K):
                product[i, j] = T.cast(out[i, j], "float32") * T.cast(dout[i, j], "float32")
            T.reduce_sum(product, delta, dim=1)
            T.copy(delta, DELTA[b, h, tile * s : (tile + 1) * s])
            for i in T.Parallel(s):
                LOG2_SUM[b, h, tile * s + i] = LOG_SUM[b, h, tile * s + i] / LOG_2

    return causal_attention_rows


def keys(H: int, G: int, K: int, dtype: str, s: int, t: int, stages: int):
    B, S = T.dynamic("B"), T.dynamic("S")

    @T.prim_func
    def causal_attention_keys(
        Q: T.Tensor((B, S, H, K), dtype),
        KEYS: T.Tensor((B, S, G, K), dtype),
        VALUES: T.Tensor((B, S, G, K), dtype),
        DOUT: T.Tensor((B, S, H, K), dtype),
        DELTA: T.Tensor((B, H, S), "float32"),
        LOG2_SUM: T.Tensor((B, H, S), "float32"),
        DKEYS: T.Tensor((B, S, G, K), dtype),
        DVALUES: T.Tensor((B, S, G, K), dtype),
        scale: T.float32,
    ):
        with T.Kernel(S // t, G, B, threads=256) as (tile, g, b):
            k = T.alloc_shared((t, K), dtype)
            v = T.alloc_shared((t, K), dtype)
            q = T.alloc_shared((s, K), dtype)
            dout = T.alloc_shared((s, K), dtype)
            log2_sum = T.alloc_shared((s,), "float32")
            delta = T.alloc_shared((s,), "float32")
            weights = T.alloc_fragment((t, s), "float32")
            dscores = T.alloc_fragment((t, s), "float32")
            narrow = T.alloc_fragment((t, s), dtype)
            dnarrow = T.alloc_fragment((t, s), dtype)
            dk = T.alloc_fragment((t, K), "float32")
            dv = T.alloc_fragment((t, K), "float32")
            T.copy(KEYS[b, tile * t : (tile + 1) * t, g, :], k)
            T.copy(VALUES[b, tile * t : (tile + 1) * t, g, :], v)
            T.fill(dk, 0)
            T.fill(dv, 0)
            each = (S - tile * t) // s
            for n in T.Pipelined(H // G * each, num_stages=stages):
                h = g * (H // G) + T.truncdiv(n, each)
                first = tile * t + T.truncmod(n, each) * s
                T.copy(Q[b, first : first + s, h, :], q)
                T.copy(LOG2_SUM[b, h, first : first + s], log2_sum)
                T.copy(DOUT[b, first : first + s, h, :], dout)
                T.copy(DELTA[b, h, first : first + s], delta)
                T.gemm(k, q, weights, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
                T.gemm(v, dout, dscores, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
                for i, j in T.Parallel(t, s):
                    weights[i, j] = T.if_then_else(
                        tile * t + i <= first + j, T.exp2(weights[i, j] * scale - log2_sum[j]), 0
                    )
                T.copy(weights, narrow)
                T.gemm(narrow, dout, dv, policy=T.GemmWarpPolicy.FullRow)
                for i, j in T.Parallel(t, s):
                    dnarrow[i, j] = weights[i, j] * (dscores[i, j] - delta[j])
                T.gemm(dnarrow, q, dk, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(t, K):
                dk[i, j] *= scale * LOG_2
            T.copy(dk, k)
            T.copy(dv, v)
            T.copy(k, DKEYS[b, tile * t : (tile + 1) * t, g, :])
            T.copy(v, DVALUES[b, tile * t : (tile + 1) * t, g, :])

    return causal_attention_keys


def queries(H: int, G: int, K: int, dtype: str, s: int, t: int, stages: int):
    B, S = T.dynamic("B"), T.dynamic("S")

    @T.prim_func
    def causal_attention_queries(
        Q: T.Tensor((B, S, H, K), dtype),
        KEYS: T.Tensor((B, S, G, K), dtype),
        VALUES: T.Tensor((B, S, G, K), dtype),
        DOUT: T.Tensor((B, S, H, K), dtype),
        DELTA: T.Tensor((B, H, S), "float32"),
        LOG2_SUM: T.Tensor((B, H, S), "float32"),
        DQ: T.Tensor((B, S, H, K), dtype),
        scale: T.float32,
    ):
        with T.Kernel(S // s, H, B, threads=256) as (tile, h, b):
            q = T.alloc_shared((s, K), dtype)
            dout = T.alloc_shared((s, K), dtype)
            k = T.alloc_shared((t, K), dtype)
            v = T.alloc_shared((t, K), dtype)
            weights = T.alloc_fragment((s, t), "float32")
            dscores = T.alloc_fragment((s, t), "float32")
            dnarrow = T.alloc_fragment((s, t), dtype)
            log2_sum = T.alloc_fragment((s,), "float32")
            delta = T.alloc_fragment((s,), "float32")
            dq = T.alloc_fragment((s, K), "float32")
            first = (S // s - 1 - tile) * s
            T.copy(Q[b, first : first + s, h, :], q)
            T.copy(DOUT[b, first : first + s, h, :], dout)
            T.copy(LOG2_SUM[b, h, first : first + s], log2_sum)
            T.copy(DELTA[b, h, first : first + s], delta)
            T.fill(dq, 0)
            for n in T.Pipelined((first + s) // t, num_stages=stages):
                T.copy(KEYS[b, n * t : (n + 1) * t, h // (H // G), :], k)
                T.copy(VALUES[b, n * t : (n + 1) * t, h // (H // G), :], v)
                T.gemm(q, k, weights, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
                T.gemm(dout, v, dscores, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True)
                for i, j in T.Parallel(s, t):
                    weights[i, j] = T.if_then_else(
                        first + i >= n * t + j, T.exp2(weights[i, j] * scale - log2_sum[i]), 0
                    )
                for i, j in T.Parallel(s, t):
                    dnarrow[i, j] = weights[i, j] * (dscores[i, j] - delta[i])
                T.gemm(dnarrow, k, dq, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(s, K):
                dq[i, j] *= scale * LOG_2
            T.copy(dq, q)
            T.copy(q, DQ[b, first : first + s, h, :])

    return causal_attention_queries


def unsupported(first: Tensor, *args: Any) -> str | None:
    if first.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {first.dtype}"
    return unfit(first.shape[1], first.shape[3])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (B, S, H, K), G = q.shape, k.shape[2]
    out, log_sum = q.new_empty(q.shape), q.new_empty(B, H, S, dtype=torch.float32)
    kernel = compiled(forward, H, G, K, DTYPES[q.dtype], *FORWARD[K])
    kernel(aligned(q), aligned(k), aligned(v), out, log_sum, scale / LOG_2)
    return out, log_sum


def causal_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (H, K), G, dtype = q.shape[2:], k.shape[2], DTYPES[q.dtype]
    dout, q, k, v = (aligned(x) for x in (dout, q, k, v))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta, log2_sum = (torch.empty_like(log_sum) for _ in range(2))
    compiled(rows, H, K, dtype)(aligned(out), dout, aligned(log_sum), delta, log2_sum)
    inputs = q, k, v, dout, delta, log2_sum
    compiled(keys, H, G, K, dtype, *KEYS[K])(*inputs, dk, dv, scale / LOG_2)
    compiled(queries, H, G, K, dtype, *QUERIES[K])(*inputs, dq, scale / LOG_2)
    return dq, dk, dv
