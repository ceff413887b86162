# mypy: disable-error-code="no-untyped-def"
"""Attention to pages in Triton. One kernel for requests with one new token and for those with more, run once for each.

A tile is some new tokens of a request, the heads that share a key-value head, and a range of keys. A request with one
new token has few rows to fill the machine with, so its keys are split, and a second kernel joins the parts. How they
are split follows from the request's own length alone: its output does not depend on who else is in the batch, nor on
the width of the table. Programs find their tiles from the lengths, on the device: the grid depends on shapes only, and
tables may be wider than needed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.launch import power_of_two, programs

MOST_REQUESTS, WIDEST, WIDEST_LATENT = 4096, 256, 512
FEWEST = 256  # requests that a kernel is compiled for
SPLIT = 512  # keys of a part, at most
PARTS_BYTES = 2 << 20  # of a request's parts: where it would have more of them, they are longer


@triton.jit
def _splits(length, window, WINDOW: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr, BN: tl.constexpr):
    """Of one new token's keys: the first, how many there are in a part, and how many parts (at least one)."""
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - window, 0) // BN * BN
    parts = tl.maximum(tl.minimum(tl.cdiv(length - first, SPLIT), MOST), 1)
    size = tl.maximum(tl.cdiv(tl.cdiv(length - first, parts), BN), 1) * BN  # all alike, or some programs end late
    return first, size, tl.maximum(tl.cdiv(length - first, size), 1)


@triton.jit
def _page(TABLE, j0, n, end, PAGE: tl.constexpr, BN: tl.constexpr):
    """The page of the keys from j0 on, or that of each. Looked up a step ahead, since the keys wait for it."""
    if PAGE % BN == 0:
        return tl.load(TABLE + j0 // PAGE, j0 < end, other=0).to(tl.int64)
    else:
        return tl.load(TABLE + (j0 + n) // PAGE, j0 + n < end, other=0).to(tl.int64)


@triton.jit
def _rows(X, page, j0, n, g, x_page, PLACE: tl.constexpr, x_head, PAGE: tl.constexpr, BN: tl.constexpr):
    """Where the keys or values from j0 on lie."""
    if PAGE % BN == 0:
        return X + (page * x_page + j0 % PAGE * PLACE + g * x_head) + (n * PLACE)[:, None]
    else:
        return X + (page * x_page + (j0 + n) % PAGE * PLACE + g * x_head)[:, None]


@triton.jit(do_not_specialize=["requests", "splits", "table_row"])  # or each batch may have to be compiled
def _attend(
    Q, KEYS, VALUES, TABLES, LENGTHS, STARTS, SLOPES, SINKS, OUT, PARTS, STATES, requests, H, group, columns, window,
    scale, softcap, q_token, q_head, k_page, k_head, v_page, v_head, table_row, splits,
    K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, K_PLACE: tl.constexpr, V_PLACE: tl.constexpr,
    SINGLE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr,
    BR: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.arange(0, BR)
    new = tl.load(STARTS + row + 1, row < requests, other=0) - tl.load(STARTS + row, row < requests, other=0)
    if SINGLE:
        lengths = tl.load(LENGTHS + row, row < requests, other=0)
        _firsts, _sizes, tiles = _splits(lengths, window, WINDOW, SPLIT, MOST, BN)
        tiles = tl.where(new == 1, tiles, 0)
    else:
        tiles = tl.where(new > 1, tl.cdiv(new, TOKENS), 0)
    ends, total = tl.cumsum(tiles, 0), tl.sum(tiles, 0)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    k, v, t = tl.arange(0, BK), tl.arange(0, BV), V + tl.arange(0, BT if BT > 0 else 16)
    for item in range(tl.program_id(0), total * columns, tl.num_programs(0)):
        tile, column = total - 1 - item // columns, item % columns  # late tokens see most: they come first
        r = tl.sum((ends <= tile).to(tl.int32), 0)
        tile -= tl.sum(tl.where(row < r, tiles, 0), 0)
        start, length = tl.load(STARTS + r), tl.load(LENGTHS + r)
        count = tl.load(STARTS + r + 1) - start
        blocks = tl.cdiv(group, HEADS)
        g, head = (column // blocks).to(tl.int64), column % blocks * HEADS + m % HEADS
        if SINGLE:
            begin, size, _parts = _splits(length, window, WINDOW, SPLIT, MOST, BN)
            token = m // HEADS
            begin += tile * size
            end = tl.minimum(begin + size, length)
        else:
            token = tile * TOKENS + m // HEADS
            begin, end = 0, tl.minimum(length - count + (tile + 1) * TOKENS, length)
            if WINDOW:
                begin = tl.maximum(length - count + tile * TOKENS - window + 1, 0) // BN * BN
        inside = (token < count) & (head < group)
        position, head = length - count + token, g * group + head
        q_at = (start + token).to(tl.int64) * q_token + head * q_head
        q = tl.load(Q + q_at[:, None] + k[None, :], inside[:, None] & (k < (V if BT > 0 else K))[None, :], other=0.0)
        if BT > 0:
            q_tail = tl.load(Q + q_at[:, None] + t[None, :], inside[:, None] & (t < K)[None, :], other=0.0)
        largest, weight = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
        if SINKS is not None:  # a key that is there before all others, whose value is zero
            first = tile == 0 if SINGLE else tile >= 0
            largest = tl.where(first, tl.load(SINKS + head, inside, other=0.0).to(tl.float32) * LOG2E, float("-inf"))
            weight += tl.where(first, 1.0, 0.0)
        if SLOPES is not None:
            slope = tl.load(SLOPES + head, inside, other=0.0).to(tl.float32) * LOG2E
        acc = tl.zeros((BM, BV), tl.float32)
        following = _page(TABLES + r * table_row, begin, n, end, PAGE, BN)
        for j0 in range(begin, end, BN):
            j, page = j0 + n, following
            following = _page(TABLES + r * table_row, j0 + BN, n, end, PAGE, BN)
            at = _rows(KEYS, page, j0, n, g, k_page, K_PLACE, k_head, PAGE, BN)
            if BT > 0:  # the first V channels are the value too
                here = (j < end)[:, None]
                x = tl.load(at + v[None, :], here if V == BV else here & (v < V)[None, :], other=0.0)
                tail = tl.load(at + t[None, :], here if K - V == BT else here & (t < K)[None, :], other=0.0)
                scores = tl.dot(q, tl.trans(x), input_precision="ieee")
                scores = tl.dot(q_tail, tl.trans(tail), scores, input_precision="ieee")
            else:
                if K == BK:
                    x = tl.load(at + k[None, :])
                else:
                    x = tl.load(at + k[None, :], (k < K)[None, :], other=0.0)
                scores = tl.dot(q, tl.trans(x), input_precision="ieee")
                v_at = _rows(VALUES, page, j0, n, g, v_page, V_PLACE, v_head, PAGE, BN)
                here = (j < end)[:, None]
                x = tl.load(v_at + v[None, :], here if V == BV else here & (v < V)[None, :], other=0.0)
            if SOFTCAP:
                scores = softcap - 2 * softcap / (tl.exp2(scores * (scale / softcap * 2 * LOG2E)) + 1)
                scores *= LOG2E
            else:
                scores *= scale * LOG2E
            distance = position[:, None] - j[None, :]
            if SLOPES is not None:
                scores -= slope[:, None] * distance.to(tl.float32)
            visible = distance >= 0
            if WINDOW:
                visible &= distance < window
            scores = tl.where(visible, scores, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            p, fade = tl.exp2(scores - finite[:, None]), tl.exp2(before - finite)
            weight = weight * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(x.dtype), x, acc * fade[:, None], input_precision="ieee")
        if PARTS is not None:
            part = (r.to(tl.int64) * H + head) * splits + tile
            tl.store(STATES + part * 2, largest, inside)
            tl.store(STATES + part * 2 + 1, weight, inside)
            tl.store(PARTS + part[:, None] * V + v[None, :], acc, inside[:, None] & (v < V)[None, :])
        else:
            acc /= tl.where(weight == 0, 1.0, weight)[:, None]
            out_at = ((start + token).to(tl.int64) * H + head)[:, None] * V + v[None, :]
            tl.store(OUT + out_at, acc.to(OUT.dtype.element_ty), inside[:, None] & (v < V)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _join(
    PARTS, STATES, LENGTHS, STARTS, OUT, H, window, splits,
    V: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The parts of a request's new token and one head, a few at a time: always in the same order."""
    r, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(STARTS + r)
    if tl.load(STARTS + r + 1) - start == 1:
        _begin, _size, parts = _splits(tl.load(LENGTHS + r), window, WINDOW, SPLIT, MOST, BN)
        first, v = (r.to(tl.int64) * H + head) * splits, tl.arange(0, BV)
        largest, weight, acc = float("-inf"), 0.0, tl.zeros((BV,), tl.float32)
        for part in range(0, parts, CHUNK):
            c = part + tl.arange(0, CHUNK)
            large = tl.load(STATES + (first + c) * 2, c < parts, other=float("-inf"))
            heavy = tl.load(STATES + (first + c) * 2 + 1, c < parts, other=0.0)
            inside = (c < parts)[:, None] & (v < V)[None, :]
            x = tl.load(PARTS + (first + c)[:, None] * V + v[None, :], inside, other=0.0)
            before, largest = largest, tl.maximum(largest, tl.max(large, 0))
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            fade, share = tl.exp2(before - finite), tl.exp2(large - finite)
            weight = weight * fade + tl.sum(heavy * share, 0)
            acc = acc * fade + tl.sum(x * share[:, None], 0)
        acc /= tl.where(weight == 0, 1.0, weight)
        tl.store(OUT + (start.to(tl.int64) * H + head) * V + v, acc.to(OUT.dtype.element_ty), v < V)


class Sizes(NamedTuple):
    """tokens, heads: of a tile. keys: of a step. registers: at most so many for a thread."""

    tokens: int
    heads: int
    keys: int
    warps: int
    stages: int
    registers: int = 255


def sizes(q: Tensor, value_dim: int, group: int, single: bool, latent: bool) -> Sizes:
    """By what was measured; docs/benchmarks.md tells how fast they are."""
    narrow, each = q.element_size() == 2, power_of_two(q.shape[-1]) * q.element_size()
    heads = min(64 if narrow else 16, power_of_two(group))
    keys, more = (max(16, min(64, size // each)) for size in (8192, 16384))
    if not narrow:  # without tensor cores, all operands are in registers
        return Sizes(1 if single else max(1, 16 // heads), heads, keys, 4, 2)
    if latent:
        return Sizes(1 if single else max(1, 64 // heads), heads, 32, 8, 3)
    if single:
        return Sizes(1, heads, keys, 4, 3, 128)
    return Sizes(max(1, 64 // heads), heads, more, 4 if value_dim <= 128 else 8, 3)


def unsupported(q: Tensor, keys: Tensor, values: Tensor | None, *rest: Any) -> str | None:
    tables, value_dim = rest[0], rest[4]
    if q.dtype == torch.float64:
        return "it computes in float32"
    if any(x is not None and (x.dtype != q.dtype or x.stride(-1) != 1) for x in (keys, values)):
        return "keys and values are of another dtype than queries, or do not lie channel by channel"
    if tables.shape[0] > MOST_REQUESTS:
        return f"more than {MOST_REQUESTS} requests"
    if values is None and (value_dim > WIDEST_LATENT or q.shape[-1] - value_dim > WIDEST_LATENT // 8):
        return f"latents of more than {WIDEST_LATENT} numbers, with shared keys of more than {WIDEST_LATENT // 8}"
    wide = values is not None and max(q.shape[-1], value_dim) > WIDEST
    return f"heads of more than {WIDEST} numbers" if wide else None


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor | None, tables: Tensor, lengths: Tensor, starts: Tensor, single: bool,
    value_dim: int, window: int | None, scale: float, softcap: float | None, slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    q = q if q.stride(-1) == 1 else q.contiguous()
    (T, H, K), (R, width), (page, G) = q.shape, tables.shape, keys.shape[1:3]
    out = q.new_empty(T, H, value_dim)
    tail = 0 if values is not None else max(16, power_of_two(K - value_dim))
    v = keys if values is None else values
    for one in (True,) if single else (True, False):
        s = sizes(q, value_dim, H // G, one, values is None)
        columns = G * triton.cdiv(H // G, s.heads)
        most = max(1, PARTS_BYTES // (H * value_dim * 4))
        seen = width * page if window is None else min(width * page, window + s.keys)
        splits = max(1, min(most, triton.cdiv(seen, SPLIT))) if one else 1
        parts = states = None
        if splits > 1:
            parts = q.new_empty(R, H, splits, value_dim, dtype=torch.float32)
            states = q.new_empty(R, H, splits, 2, dtype=torch.float32)
        BV = max(16, power_of_two(value_dim))
        shared = {"V": value_dim, "WINDOW": window is not None, "SPLIT": SPLIT, "MOST": most, "BN": s.keys, "BV": BV}
        tiles = columns * (R * splits if one else triton.cdiv(T, s.tokens) + R)
        count = programs(q, tiles, s.warps) if one else tiles
        _attend[(count,)](
            q, keys, values, tables, lengths, starts, slopes, sinks, out, parts, states, R, H, H // G, columns,
            window or 0, scale, softcap or 0.0, *q.stride()[:2], *keys.stride()[:3:2], *v.stride()[:3:2],
            tables.stride(0), splits, K=K, PAGE=page, K_PLACE=keys.stride(1), V_PLACE=v.stride(1), SINGLE=one,
            SOFTCAP=softcap is not None, BR=max(FEWEST, power_of_two(R)), TOKENS=s.tokens, HEADS=s.heads,
            BM=max(16, s.tokens * s.heads), BK=BV if tail else max(16, power_of_two(K)), BT=tail, **shared,
            num_warps=s.warps, num_stages=s.stages, maxnreg=s.registers,
        )  # fmt: skip
        if parts is not None:
            tensors = parts, states, lengths, starts, out
            _join[(R, H)](*tensors, H, window or 0, splits, **shared, CHUNK=8, num_warps=max(1, BV // 128))
    return out
