"""Rotary positions in Mojo (`mojo/rope.mojo`): queries and keys in one launch, each number read and written once."""

from typing import Any

import torch
from torch import Tensor

from treadle.kernels import mojo
from treadle.kernels.launch import aligned


def unsupported(q: Tensor, k: Tensor, *args: Any) -> str | None:
    tensors = args[2:] if len(args) > 7 else args  # the backward's: before the weights come queries and keys
    q_weight, _, cos, sin, _, _, layout = tensors
    if q_weight is not None:
        return "it has no norm"
    if layout != "half":
        return f"it has the layout half only, not {layout}"
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return "its tables are in float32"
    if (cos.shape[-1] // 2) % mojo.vector(q):
        return f"{cos.shape[-1] // 2} pairs are no multiple of 16 bytes"
    return mojo.misfit(q, k)


def rope(q: Tensor, k: Tensor, _: Any, __: Any, cos: Tensor, sin: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _turned(q, k, cos, sin, 1.0)


def rope_backward(
    dq: Tensor, dk: Tensor, q: Any, k: Any, _: Any, __: Any, cos: Tensor, sin: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return *_turned(dq, dk, cos, sin, -1.0), dq.new_empty(0), dk.new_empty(0)


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    q, k, (B, S, H, K), G = _heads(q), _heads(k), q.shape, k.shape[2]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    tensors = q, k, aligned(cos), aligned(sin), q_out, k_out
    strides = *q.stride()[:3], *k.stride()[:3]
    sizes = S, cos.shape[0] * cos.shape[1], H, G, K, cos.shape[-1]
    mojo.call("rope", f"rope_{mojo.DTYPES[q.dtype]}", q, (B * S,), *tensors, *strides, *sizes, B * S, sign)
    return q_out, k_out


def _heads(x: Tensor) -> Tensor:
    """Where each head begins at a multiple of 16 bytes: x as it lies in memory, or a copy."""
    lies = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(n % mojo.vector(x) for n in x.stride()[:3])
    return x if lies else aligned(x)
