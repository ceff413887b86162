"""Rotary positions of queries and keys, with or without the norm that comes before.

B batch, S sequence, H and G heads of queries and keys, K head dim, R rotated channels of a head.
"""

from typing import Any, Literal

import torch
from torch import Tensor, autograd

from treadle.kernels.norms import rms_norm, rms_norm_definition
from treadle.kernels.operation import Floor, Gradient, Operation, Shape, nbytes

Layout = Literal["half", "interleaved"]


def rope(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    cos_BS1R: Tensor,
    sin_BS1R: Tensor,
    layout: Layout = "half",
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs of the first R channels of each head, in the dtype of the tables; returns the dtypes of q and k.

    cos, sin: each frequency twice, for the two channels of its pair; no gradient. layout: `half` pairs channels i and
    i + R/2, `interleaved` 2i and 2i + 1. norms: weights_K of the RMS norms of queries and keys, taken before.
    """
    weights = norms or (None, None)
    args = q_BSHK, k_BSGK, *weights, cos_BS1R, sin_BS1R, eps, offset, layout
    if ROPE.worthwhile(*args):
        return _Rope.apply(*args)  # type: ignore[no-any-return]
    q, k = q_BSHK, k_BSGK
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps, offset), rms_norm(k, norms[1], eps, offset)
    return rotate(q, cos_BS1R, sin_BS1R, layout), rotate(k, cos_BS1R, sin_BS1R, layout)


def rotate(x_BSHK: Tensor, cos_BS1R: Tensor, sin_BS1R: Tensor, layout: Layout = "half") -> Tensor:
    """One of the two, without norm: the definition."""
    R = cos_BS1R.shape[-1]
    if x_BSHK.shape[-1] > R:
        turned_BSHR = rotate(x_BSHK[..., :R], cos_BS1R, sin_BS1R, layout)
        return torch.cat((turned_BSHR, x_BSHK[..., R:]), dim=-1)
    x = x_BSHK.to(cos_BS1R.dtype)
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        quarter = torch.cat((-second, first), dim=-1)
    else:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * cos_BS1R + quarter * sin_BS1R).to(x_BSHK.dtype)


def _rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm_definition(q, q_weight, eps, offset), rms_norm_definition(k, k_weight, eps, offset)
    return rotate(q, cos, sin, layout), rotate(k, cos, sin, layout)


class _Rope(autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        q_weight, k_weight, cos, sin, *ctx.rest = args
        inputs = (q, k) if q_weight is not None else (None, None)  # a rotation alone needs its angles only
        ctx.save_for_backward(*inputs, q_weight, k_weight, cos, sin)
        return torch.ops.treadle.rope(q, k, *args)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: of recomputed ones there is no second time
        found = torch.ops.treadle.rope_backward(*grads, *saved, *ctx.rest)
        dweights = found[2:] if saved[0] is not None else (None, None)
        return *found[:2], *dweights, None, None, None, None, None


# B, S, H, G, K, R, interleaved, normed
CHECKED = (
    (2, 5, 4, 2, 16, 16, 0, 0),
    (1, 7, 3, 1, 12, 8, 0, 0),
    (2, 3, 2, 2, 16, 16, 1, 0),
    (1, 4, 5, 1, 20, 12, 1, 1),
    (2, 3, 6, 2, 64, 64, 0, 1),
)
TIMED = ((4, 8192, 32, 8, 64, 64, 0, 0), (2, 8192, 32, 8, 128, 128, 0, 0), (1, 8192, 32, 8, 128, 128, 0, 1))


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Queries and keys as they come: parts of one tensor, with the values after them."""
    B, S, H, G, K, R, interleaved, normed = shape
    packed = torch.randn(B, S, H + 2 * G, K, dtype=dtype, device=device)
    q, k, _ = packed.split((H, G, G), dim=2)
    angles = torch.rand(B, S, 1, R // 2, device=device) * 100
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    weights = [torch.rand(K, device=device) + 0.5 if normed else None for _ in range(2)]
    return q, k, *weights, angles.cos(), angles.sin(), 1e-5, 0.0, "interleaved" if interleaved else "half"


def _backward_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    q, k, *rest = _arguments(shape, dtype, device)
    grads = (torch.randn(x.shape, dtype=dtype, device=device) for x in (q, k))
    return *grads, *((q, k) if rest[0] is not None else (None, None)), *rest


def _pieces(dq: Tensor, dk: Tensor, q: Any, k: Any, q_weight: Any, k_weight: Any, *rest: Any) -> Any:
    if q is None:  # a linear map: where it is taken does not matter
        return lambda q, k: _rope(q, k, None, None, *rest), (torch.zeros_like(dq), torch.zeros_like(dk)), (dq, dk)
    return lambda q, k, w, v: _rope(q, k, w, v, *rest), (q, k, q_weight, k_weight), (dq, dk)


class _RopeGradient(Gradient):
    def __call__(self, *args: Any) -> Any:
        dq, dk, *dweights = super().__call__(*args)
        return dq, dk, *(dweights or (dq.new_empty(0), dk.new_empty(0)))


def _fake_backward(dq: Tensor, dk: Tensor, q: Any, k: Any, q_weight: Any, k_weight: Any, *_: Any) -> Any:
    dweights = (x.new_empty(0) if w is None else w.new_empty(w.shape) for x, w in ((dq, q_weight), (dk, k_weight)))
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape), *dweights


ROPE = Operation(
    name="rope",
    schema="(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, float offset, "
    "str layout) -> (Tensor, Tensor)",
    module=__name__,
    reference=_rope,
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    floor=lambda q, k, q_weight, k_weight, cos, sin, *_: Floor(
        2 * nbytes(q, k) + nbytes(cos), (3 if q_weight is None else 7) * (q.numel() + k.numel())
    ),
    arguments=_arguments,
    checked=CHECKED,
    timed=TIMED,
)

Operation(
    name="rope_backward",
    schema="(Tensor dq, Tensor dk, Tensor? q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
    "float eps, float offset, str layout) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
    module=__name__,
    reference=_RopeGradient(_pieces),
    fake=_fake_backward,
    floor=lambda dq, dk, q, k, q_weight, k_weight, cos, *_: Floor(
        2 * nbytes(dq, dk) + nbytes(q, k, cos), (3 if q is None else 15) * (dq.numel() + dk.numel())
    ),
    arguments=_backward_arguments,
    checked=CHECKED,
    timed=TIMED,
)
