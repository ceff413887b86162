# mypy: disable-error-code="no-untyped-def"
"""Draws in Triton: one pass over the scores, in pieces of rows, and a small one over what the pieces have found.

A piece has the same columns whatever the number of rows, so that a row's numbers do not depend on the others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, PIECE, WARPS = 1024, 8192, 4
MOST = 128  # pieces of a row
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 13787848793156543929
    x = (x ^ (x >> 27)) * 10723151780598845931
    return x ^ (x >> 31)


@triton.jit
def _gumbel(start, column):
    x = _mix(start + column.to(tl.uint64) * 11400714819323198485)
    above = (0x7FFFFF - (x >> 41)).to(tl.float32)
    v = (above + 0.5) * 1.1920928955078125e-07  # 1 - u, exactly
    # Where u is close to 1 its logarithm is small, and would have few digits.
    series = v * (1.0 + v * (0.5 + v * (0.3333333333 + v * 0.25)))
    exponential = tl.where(v < 0.01, series, -tl.log2(1.0 - v) * LN2)
    return -tl.log2(exponential) * LN2


@triton.jit
def _pieces(
    X, TEMPERATURES, SEEDS, POSITIONS, SCORES, TOKENS, HIGHS, TOTALS, V,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(TEMPERATURES + row)
    seed = tl.load(SEEDS + row).to(tl.uint64, bitcast=True)
    position = tl.load(POSITIONS + row).to(tl.uint64, bitcast=True)
    start = _mix(_mix(seed) + position * 11400714819323198485)
    # Columns j, j + BLOCK, ... have a best, a maximum and a sum of their own, put together at the end.
    score = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = piece * PIECE + tl.arange(0, BLOCK)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, PIECE, BLOCK):
        column = piece * PIECE + offset + tl.arange(0, BLOCK)
        x = tl.load(X + row * V + column, column < V, other=float("-inf")).to(tl.float32)
        noisy = x
        if temperature != 0.0:
            noisy = x / temperature + _gumbel(start, column)
        better = noisy > score
        score, token = tl.where(better, noisy, score), tl.where(better, column, token)
        higher = tl.maximum(high, x)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((high - base) * LOG2E) + tl.exp2((x - base) * LOG2E)
        high = higher
    best, highest = tl.max(score, 0), tl.max(high, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    place = row * MOST + piece
    tl.store(SCORES + place, best)
    tl.store(TOKENS + place, tl.min(tl.where(score == best, token, V - 1), 0))
    tl.store(HIGHS + place, highest)
    tl.store(TOTALS + place, tl.sum(total * tl.exp2((high - base) * LOG2E), 0))


@triton.jit
def _together(X, SCORES, TOKENS, HIGHS, TOTALS, DRAWN, LOGP, V, pieces, MOST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, MOST)
    here, place = piece < pieces, row * MOST + piece  # the rest of these rows was never written
    score = tl.where(here, tl.load(SCORES + place), float("-inf"))
    high = tl.where(here, tl.load(HIGHS + place), float("-inf"))
    total = tl.where(here, tl.load(TOTALS + place), 0.0)
    token = tl.min(tl.where(here & (score == tl.max(score, 0)), tl.load(TOKENS + place), V - 1), 0)
    highest = tl.max(high, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    lse = base + tl.log2(tl.sum(total * tl.exp2((high - base) * LOG2E), 0)) * LN2
    tl.store(DRAWN + row, token.to(tl.int64))
    tl.store(LOGP + row, tl.load(X + row * V + token).to(tl.float32) - lse)


def unsupported(x: Tensor, *_: Any) -> str | None:
    if x.shape[1] > MOST * PIECE:
        return f"a vocabulary of {x.shape[1]} is larger than {MOST * PIECE}"
    return "it computes in float32" if x.dtype == torch.float64 else None


def draw(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    logits, (R, V) = logits.contiguous(), logits.shape
    scores, highs, totals = (logits.new_empty(R, MOST, dtype=torch.float32) for _ in range(3))
    places = logits.new_empty(R, MOST, dtype=torch.int32)
    found, pieces = (scores, places, highs, totals), triton.cdiv(V, PIECE)
    sizes = {"BLOCK": BLOCK, "PIECE": PIECE, "num_warps": WARPS}
    _pieces[(R, pieces)](logits, temperatures, seeds, positions, *found, V, MOST=MOST, **sizes)
    tokens, logp = torch.empty_like(seeds), logits.new_empty(R, dtype=torch.float32)
    _together[(R,)](logits, *found, tokens, logp, V, pieces, MOST=MOST, num_warps=1)
    return tokens, logp
