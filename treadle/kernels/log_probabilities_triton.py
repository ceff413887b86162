# mypy: disable-error-code="no-untyped-def"
"""Log probabilities in Triton: one pass over the logits, with a running maximum and sum for each column of a block."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 16
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 4
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward(X, TOKENS, LOGP, LSE, V, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # Columns j, j + BLOCK, j + 2 BLOCK ... have a maximum and a sum of their own, put together at the end.
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    scale = LOG2E / temperature
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * V + column, column < V, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(high, x)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(high - base) + tl.exp2(x - base)
        high = higher
    highest = tl.max(high, 0)
    lse = (highest + tl.log2(tl.sum(total * tl.exp2(high - highest), 0))) / LOG2E
    token = tl.load(TOKENS + row)
    picked = tl.load(X + row * V + tl.maximum(token, 0)).to(tl.float32) / temperature
    tl.store(LSE + row, lse)
    tl.store(LOGP + row, tl.where(token >= 0, picked - lse, 0.0))


@triton.jit
def _backward(DLOGP, X, TOKENS, LSE, DX, V, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(TOKENS + row)
    scale = tl.where(token >= 0, tl.load(DLOGP + row), 0.0) / temperature
    x = tl.load(X + row * V + column, column < V, other=0.0).to(tl.float32)
    softmax = tl.exp2((x / temperature - tl.load(LSE + row)) * LOG2E)
    dx = scale * ((column == token).to(tl.float32) - softmax)
    tl.store(DX + row * V + column, dx.to(DX.dtype.element_ty), column < V)


def unsupported(x: Tensor, *_: Any) -> str | None:
    return "it computes in float32" if x.dtype == torch.float64 else None


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits, (T, V) = logits.contiguous(), logits.shape
    logp, lse = (logits.new_empty(T, dtype=torch.float32) for _ in range(2))
    _forward[(T,)](logits, tokens, logp, lse, V, temperature, BLOCK=BLOCK, num_warps=WARPS)
    return logp, lse


def log_probabilities_backward(
    dlogp: Tensor, logits: Tensor, tokens: Tensor, lse: Tensor, temperature: float
) -> Tensor:
    logits, (T, V) = logits.contiguous(), logits.shape
    dx = torch.empty_like(logits)
    sizes = {"BLOCK": BACKWARD_BLOCK, "num_warps": BACKWARD_WARPS}
    grid = (T, triton.cdiv(V, BACKWARD_BLOCK))
    _backward[grid](dlogp.contiguous(), logits, tokens, lse, dx, V, temperature, **sizes)
    return dx
