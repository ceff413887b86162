# mypy: disable-error-code="no-untyped-def"
"""Rotary positions in Triton: a program takes all heads of a token, and reads its cosines and sines once.

The channels of a head are held as the two of each pair (1, 2), and those that are not rotated (the tail, T).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.launch import power_of_two, programs

WARPS = 4


@triton.jit
def _pairs(X, at, inside, J, HALF: tl.constexpr, BJ: tl.constexpr):
    """The first and the second of each pair, of heads that begin `at`."""
    if HALF:
        j = tl.arange(0, BJ)[None, :]
        first = tl.load(X + at + j, inside & (j < J), other=0.0)
        second = tl.load(X + at + J + j, inside & (j < J), other=0.0)
    else:
        r = tl.arange(0, 2 * BJ)[None, :]
        x = tl.load(X + at + r, inside & (r < 2 * J), other=0.0)
        first, second = tl.split(tl.reshape(x, (inside.shape[0], BJ, 2)))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _tail(X, at, inside, J, K, BT: tl.constexpr):
    if BT == 0:
        return tl.zeros((1, 1), tl.float32)
    else:
        t = 2 * J + tl.arange(0, BT)[None, :]
        return tl.load(X + at + t, inside & (t < K), other=0.0).to(tl.float32)


@triton.jit
def _store_tail(X, tail, at, inside, J, K, BT: tl.constexpr):
    if BT > 0:
        t = 2 * J + tl.arange(0, BT)[None, :]
        tl.store(X + at + t, tail.to(X.dtype.element_ty), inside & (t < K))


@triton.jit
def _store_pairs(X, first, second, at, inside, J, HALF: tl.constexpr, BJ: tl.constexpr):
    first, second = first.to(X.dtype.element_ty), second.to(X.dtype.element_ty)
    if HALF:
        j = tl.arange(0, BJ)[None, :]
        tl.store(X + at + j, first, inside & (j < J))
        tl.store(X + at + J + j, second, inside & (j < J))
    else:
        r = tl.arange(0, 2 * BJ)[None, :]
        x = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BJ))
        tl.store(X + at + r, x, inside & (r < 2 * J))


@triton.jit
def _weights(WEIGHT, like, offset, J, K, HALF: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr):
    zero = tl.zeros((1, 1), tl.int32)
    w1, w2 = _pairs(WEIGHT, zero, zero == 0, J, HALF, BJ)
    wt = _tail(WEIGHT, zero, zero == 0, J, K, BT)
    return (
        w1.to(like.dtype.element_ty).to(tl.float32) + offset,
        w2.to(like.dtype.element_ty).to(tl.float32) + offset,
        wt.to(like.dtype.element_ty).to(tl.float32) + offset,
    )


@triton.jit
def _turn(
    X, WEIGHT, Y, cos, sin, token, begin, head_stride, heads, J, K, eps, offset,
    HALF: tl.constexpr, BH: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """All heads of a token: norm if there is a weight, then rotate."""
    head = tl.arange(0, BH)[:, None]
    at, to, inside = begin + head * head_stride, (token * heads + head) * K, head < heads
    first, second = _pairs(X, at, inside, J, HALF, BJ)
    tail = _tail(X, at, inside, J, K, BT)
    if WEIGHT is not None:
        w1, w2, wt = _weights(WEIGHT, X, offset, J, K, HALF, BJ, BT)
        squares = tl.sum(first * first + second * second, 1, keep_dims=True) + tl.sum(tail * tail, 1, keep_dims=True)
        rstd = tl.rsqrt(squares / K + eps)
        first, second, tail = first * rstd * w1, second * rstd * w2, tail * rstd * wt
    _store_pairs(Y, first * cos - second * sin, second * cos + first * sin, to, inside, J, HALF, BJ)
    _store_tail(Y, tail, to, inside, J, K, BT)


@triton.jit
def _rotate(
    Q, KEYS, Q_WEIGHT, K_WEIGHT, COS, SIN, Q_OUT, K_OUT, q_batch, q_token, q_head, k_batch, k_token, k_head,
    H, G, S, tables, J, K, eps, offset, SIGN: tl.constexpr,
    HALF: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    zero = tl.zeros((1, 1), tl.int32)
    cos, _ = _pairs(COS + token % tables * 2 * J, zero, zero == 0, J, HALF, BJ)
    sin, _ = _pairs(SIN + token % tables * 2 * J, zero, zero == 0, J, HALF, BJ)
    sin *= SIGN
    begin = b * q_batch + s * q_token
    _turn(Q, Q_WEIGHT, Q_OUT, cos, sin, token, begin, q_head, H, J, K, eps, offset, HALF, BH, BJ, BT)
    begin = b * k_batch + s * k_token
    _turn(KEYS, K_WEIGHT, K_OUT, cos, sin, token, begin, k_head, G, J, K, eps, offset, HALF, BG, BJ, BT)


@triton.jit
def _turn_back(
    DY, X, WEIGHT, DX, PARTS, COS, SIN, dy_batch, dy_token, dy_head, x_batch, x_token, x_head,
    heads, S, tokens, tables, J, K, eps, offset,
    HALF: tl.constexpr, BH: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradient of norm and rotation, of queries or keys; a program goes through many tokens."""
    head, zero = tl.arange(0, BH)[:, None], tl.zeros((1, 1), tl.int32)
    inside = head < heads
    w1, w2, wt = _weights(WEIGHT, X, offset, J, K, HALF, BJ, BT)
    dw1, dw2 = tl.zeros((BH, BJ), tl.float32), tl.zeros((BH, BJ), tl.float32)
    dwt = tl.zeros((BH, BT if BT > 0 else 1), tl.float32)
    for step in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = step + tl.zeros((1, 1), tl.int64)
        b, s = token // S, token % S
        at, to = b * x_batch + s * x_token + head * x_head, (token * heads + head) * K
        dy_at = b * dy_batch + s * dy_token + head * dy_head
        cos, _ = _pairs(COS + token % tables * 2 * J, zero, zero == 0, J, HALF, BJ)
        sin, _ = _pairs(SIN + token % tables * 2 * J, zero, zero == 0, J, HALF, BJ)
        x1, x2 = _pairs(X, at, inside, J, HALF, BJ)
        y1, y2 = _pairs(DY, dy_at, inside, J, HALF, BJ)
        xt, dt = _tail(X, at, inside, J, K, BT), _tail(DY, dy_at, inside, J, K, BT)
        d1, d2 = y1 * cos + y2 * sin, y2 * cos - y1 * sin
        squares = tl.sum(x1 * x1 + x2 * x2, 1, keep_dims=True) + tl.sum(xt * xt, 1, keep_dims=True)
        rstd = tl.rsqrt(squares / K + eps)
        x1, x2, xt = x1 * rstd, x2 * rstd, xt * rstd
        dw1, dw2, dwt = dw1 + d1 * x1, dw2 + d2 * x2, dwt + dt * xt
        d1, d2, dt = d1 * w1, d2 * w2, dt * wt
        along = (tl.sum(d1 * x1 + d2 * x2, 1, keep_dims=True) + tl.sum(dt * xt, 1, keep_dims=True)) / K
        _store_pairs(DX, rstd * (d1 - x1 * along), rstd * (d2 - x2 * along), to, inside, J, HALF, BJ)
        _store_tail(DX, rstd * (dt - xt * along), to, inside, J, K, BT)
    part = PARTS + tl.program_id(0) * K
    dw1, dw2 = tl.sum(dw1, 0, keep_dims=True), tl.sum(dw2, 0, keep_dims=True)
    _store_pairs(part, dw1, dw2, zero, zero == 0, J, HALF, BJ)
    _store_tail(part, tl.sum(dwt, 0, keep_dims=True), zero, zero == 0, J, K, BT)


def unsupported(q: Tensor, *_: Any) -> str | None:
    if q.dtype == torch.float64:
        return "it computes in float32"
    return "a token's heads are more than 32,768 numbers" if q.shape[2] * q.shape[3] > 32768 else None


def rope(
    q: Tensor, k: Tensor, q_weight: Any, k_weight: Any, cos: Tensor, sin: Tensor, eps: float, offset: float, layout: str
) -> tuple[Tensor, Tensor]:
    return _rotated(q, k, q_weight, k_weight, cos, sin, eps, offset, layout, 1)


def rope_backward(
    dq: Tensor, dk: Tensor, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Tensor, sin: Tensor, eps: float,
    offset: float, layout: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    if q is None:
        found = _rotated(dq, dk, None, None, cos, sin, eps, offset, layout, -1)
        return *found, dq.new_empty(0), dk.new_empty(0)
    (dq, dq_weight), (dk, dk_weight) = (
        _turned_back(*tensors, cos, sin, eps, offset, layout) for tensors in ((dq, q, q_weight), (dk, k, k_weight))
    )
    return dq, dk, dq_weight, dk_weight


def _rotated(
    q: Tensor, k: Tensor, q_weight: Any, k_weight: Any, cos: Tensor, sin: Tensor, eps: float, offset: float,
    layout: str, sign: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, (B, S, H, K), G = _heads(q), _heads(k), q.shape, k.shape[2]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    sizes = _sizes(cos, K)
    _rotate[(B * S,)](
        q, k, q_weight, k_weight, cos.contiguous(), sin.contiguous(), q_out, k_out, *q.stride()[:3], *k.stride()[:3],
        H, G, S, cos.shape[0] * cos.shape[1], cos.shape[-1] // 2, K, eps, offset, SIGN=sign, HALF=layout == "half",
        BH=power_of_two(H), BG=power_of_two(G), **sizes, num_warps=WARPS,
    )  # fmt: skip
    return q_out, k_out


def _turned_back(
    dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float, layout: str
) -> tuple[Tensor, Tensor]:
    dy, x, (B, S, H, K) = _heads(dy), _heads(x), x.shape
    count = programs(x, B * S, WARPS)
    dx, parts = x.new_empty(x.shape), x.new_empty(count, K, dtype=torch.float32)
    _turn_back[(count,)](
        dy, x, weight, dx, parts, cos.contiguous(), sin.contiguous(), *dy.stride()[:3], *x.stride()[:3], H, S, B * S,
        cos.shape[0] * cos.shape[1], cos.shape[-1] // 2, K, eps, offset, HALF=layout == "half", BH=power_of_two(H),
        **_sizes(cos, K), num_warps=WARPS,
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


def _heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(cos: Tensor, K: int) -> dict[str, int]:
    R = cos.shape[-1]
    return {"BJ": power_of_two(R // 2), "BT": power_of_two(K - R) if K > R else 0}
