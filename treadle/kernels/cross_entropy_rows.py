# mypy: disable-error-code="no-untyped-def"
"""Softmax cross entropy of logits that are there, and its gradient in their place: a Triton kernel, one row a program.

A row of 128k logits is 256 KiB: with one program on each multiprocessor the rows under way stay in the L2 cache, so
that the second look at them, which turns them into the gradient, reads no memory.

C rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 16384, 32  # so many threads that a multiprocessor holds one program only


def cross_entropy_rows(
    logits_CV: Tensor, targets_C: Tensor, softcap: float | None, z_loss: float, smoothing: float, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_cross_entropy._loss_and_gradient`, whose result it has, but the logits are overwritten if need be."""
    C, V = logits_CV.shape
    loss_C, penalty_C = torch.empty(2, C, dtype=torch.float32, device=logits_CV.device).unbind()
    _rows[(C,)](
        logits_CV,
        targets_C,
        loss_C,
        penalty_C,
        softcap or 1.0,
        z_loss,
        smoothing,
        V,
        CAPPED=softcap is not None,
        SMOOTHED=smoothing > 0,
        GRADIENT=need_gradient,
        BLOCK=min(BLOCK, triton.next_power_of_2(V)),
        num_warps=WARPS,
    )
    return loss_C.sum(), penalty_C.sum(), logits_CV


@triton.jit
def _rows(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    penalty_ptr,
    softcap,
    z_loss,
    smoothing,
    V,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    target = tl.load(targets_ptr + row)
    counts = target >= 0
    picked = _capped(tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32), softcap, CAPPED)
    columns = tl.arange(0, BLOCK)
    largest, total, scores = float("-inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        z = tl.load(logits_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        z = _capped(z, softcap, CAPPED)
        if CAPPED:  # of minus infinity, it is finite
            z = tl.where(start + columns < V, z, float("-inf"))
        if SMOOTHED:
            scores += tl.sum(tl.where(start + columns < V, z, 0.0))
        higher = tl.maximum(largest, tl.max(z))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher))
        largest = higher
    lse = largest + tl.log(total)
    if SMOOTHED:
        picked += smoothing * (scores / V - picked)
    penalty = tl.where(counts, z_loss * lse * lse, 0.0)
    tl.store(penalty_ptr + row, penalty)
    tl.store(loss_ptr + row, tl.where(counts, lse - picked, 0.0) + penalty)
    if GRADIENT:
        scale = tl.where(counts, 1 + 2 * z_loss * lse, 0.0)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            z = _capped(tl.load(logits_ptr + start + columns, mask=inside).to(tl.float32), softcap, CAPPED)
            dz = tl.exp(z - lse) * scale - tl.where(start + columns == target, 1.0 - smoothing, 0.0)
            if SMOOTHED:
                dz -= tl.where(counts, smoothing / V, 0.0)
            if CAPPED:
                dz *= 1 - (z / softcap) * (z / softcap)
            tl.store(logits_ptr + start + columns, dz.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _capped(z, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z
