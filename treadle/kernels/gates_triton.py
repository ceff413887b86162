# mypy: disable-error-code="no-untyped-def"
"""Gated activations in Triton: both halves are read where they lie, and their gradients written side by side."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.launch import rows_of

BLOCK, WARPS = 2048, 8


@triton.jit
def _activation(gate, NAME: tl.constexpr):
    """Value and derivative."""
    if NAME == "silu":
        s = tl.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    elif NAME == "clamped_silu":
        s = tl.sigmoid(1.702 * gate)
        return gate * s, s * (1 + 1.702 * gate * (1 - s))
    elif NAME == "gelu":
        below = 0.5 + 0.5 * tl.erf(0.7071067811865476 * gate)
        return gate * below, below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        return gate * s, s + gate * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    elif NAME == "sigmoid":
        s = tl.sigmoid(gate)
        return s, s * (1 - s)
    elif NAME == "relu":
        return tl.maximum(gate, 0.0), (gate > 0).to(tl.float32)
    else:
        tl.static_assert(NAME == "relu2")
        positive = tl.maximum(gate, 0.0)
        return positive * positive, 2 * positive


@triton.jit
def _halves(X, row, column, F, inside, NAME: tl.constexpr):
    gate = tl.load(X + row * 2 * F + column, inside, other=0.0).to(tl.float32)
    up = tl.load(X + row * 2 * F + F + column, inside, other=0.0).to(tl.float32)
    if NAME == "clamped_silu":
        return tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0) + 1, gate <= 7.0, tl.abs(up) <= 7.0
    return gate, up, inside, inside


@triton.jit
def _forward(X, Y, F, NAME: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate, up, _, _ = _halves(X, row, column, F, inside, NAME)
    value, _ = _activation(gate, NAME)
    tl.store(Y + row * F + column, (value * up).to(Y.dtype.element_ty), inside)


@triton.jit
def _backward(DY, X, DX, F, NAME: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    dy = tl.load(DY + row * F + column, inside, other=0.0).to(tl.float32)
    gate, up, gate_moves, up_moves = _halves(X, row, column, F, inside, NAME)
    value, derivative = _activation(gate, NAME)
    dgate = tl.where(gate_moves, dy * up * derivative, 0.0)
    dup = tl.where(up_moves, dy * value, 0.0)
    tl.store(DX + row * 2 * F + column, dgate.to(DX.dtype.element_ty), inside)
    tl.store(DX + row * 2 * F + F + column, dup.to(DX.dtype.element_ty), inside)


def unsupported(x: Tensor, *_: Any) -> str | None:
    return "it computes in float32" if x.dtype == torch.float64 else None


def gated_activation(x: Tensor, activation: str) -> Tensor:
    x_NF, F = rows_of(x), x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], F)
    _forward[(x_NF.shape[0], triton.cdiv(F, BLOCK))](x_NF, y, F, NAME=activation, BLOCK=BLOCK, num_warps=WARPS)
    return y


def gated_activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    dy_NF, x_NF, F = rows_of(dy), rows_of(x), dy.shape[-1]
    dx = x.new_empty(x.shape)
    grid = (x_NF.shape[0], triton.cdiv(F, BLOCK))
    _backward[grid](dy_NF, x_NF, dx, F, NAME=activation, BLOCK=BLOCK, num_warps=WARPS)
    return dx
