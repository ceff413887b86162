"""Causal softmax attention of whole rows: each query sees the keys up to its own place.

B batch, S sequence, H heads, G key-value heads, K head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels.operation import Floor, Gradient, Operation, Shape, nbytes

HEAD_DIMS, TILE = (64, 128), 128


def unfit(length: int, head_dim: int) -> str | None:
    """Why kernels that go by whole tiles cannot compute such a shape; None if they can."""
    if head_dim not in HEAD_DIMS:
        return f"its head dims are {' and '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return f"its lengths are multiples of {TILE}, not {length}" if length % TILE or not length else None


def _attend(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGK))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _definition(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Also returns the natural logarithm of what each softmax divides by, in float32.  -> out_BSHK, log_sum_BHS"""
    q_BGRSK = q_BSHK.transpose(1, 2).unflatten(1, (k_BSGK.shape[2], -1))
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    scores = scale * q_BGRSK.to(wide) @ k_BSGK.to(wide).permute(0, 2, 3, 1)[:, :, None]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    log_sum = scores.masked_fill(later, float("-inf")).logsumexp(-1).flatten(1, 2)
    return _attend(q_BSHK, k_BSGK, v_BSGK, scale), log_sum


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    B, S, H, G, K = shape
    q, k, v = (torch.randn(B, S, heads, K, dtype=dtype, device=device) for heads in (H, G, G))
    return q, k, v, K**-0.5


def _backward_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """What the forward returns is computed head by head: at the sizes of training, not all scores fit into memory."""
    q, k, v, scale = _arguments(shape, dtype, device)
    R = q.shape[2] // k.shape[2]
    log_sum = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    for h in range(q.shape[2]):
        q_1S1K, k_1S1K, v_1S1K = (x[:1, :, i : i + 1] for x, i in ((q, h), (k, h // R), (v, h // R)))
        log_sum[:1, h : h + 1] = _definition(q_1S1K, k_1S1K, v_1S1K, scale)[1]
    if q.shape[0] > 1:  # further rows are the first one's
        q, k, v = (x[:1].expand(x.shape).contiguous() for x in (q, k, v))
        log_sum = log_sum[:1].expand(log_sum.shape).contiguous()
    return torch.randn_like(q), q, k, v, _attend(q, k, v, scale).contiguous(), log_sum, scale


def _flops(q: Tensor) -> float:
    """Of the forward: two matrix products, half of each."""
    return 2.0 * q.numel() * q.shape[1]


CHECKED = ((1, 128, 2, 2, 64), (2, 256, 4, 2, 128), (1, 384, 6, 1, 64), (1, 100, 2, 1, 64))
TIMED = ((2, 8192, 32, 8, 128), (4, 4096, 32, 8, 64))

CAUSAL_ATTENTION = Operation(
    name="causal_attention",
    schema="(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor log_sum)",
    module=__name__,
    reference=_definition,
    plain=_attend,
    fake=lambda q, k, v, scale: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32)),
    ),
    floor=lambda q, k, v, scale: Floor(nbytes(q, k, v, q) + 4 * q[..., 0].numel(), _flops(q)),
    arguments=_arguments,
    checked=CHECKED,
    timed=TIMED,
)

CAUSAL_ATTENTION_BACKWARD = Operation(
    name="causal_attention_backward",
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    module=__name__,
    reference=Gradient(
        lambda dout, q, k, v, out, log_sum, scale: (lambda q, k, v: _attend(q, k, v, scale), (q, k, v), dout)
    ),
    fake=lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    floor=lambda dout, q, k, v, *_: Floor(nbytes(dout, q, k, v, q, q, k, v), 2.5 * _flops(q)),
    arguments=_backward_arguments,
    checked=CHECKED,
    timed=TIMED,
)
