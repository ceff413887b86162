"""Rows of a mixture of experts: from tokens to the order of their experts, and back as a weighted sum.

T tokens, K experts of each, N = T*K rows, D numbers of a row. Row k*T + t is the k-th choice of token t, and is found
at inverse[k*T + t] of the sorted rows.
"""

from typing import Any

import torch
from torch import Tensor, autograd

from treadle.kernels.operation import Floor, Gradient, Operation, Shape, nbytes


def spread_rows(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Row order[n] mod T of x for each n.  -> rows_ND

    inverse_N: the inverse of the permutation order_N. The backward gathers too, where PyTorch's would add rows one by
    one, in no fixed order on a GPU.
    """
    return _Spread.apply(x_TD, order_N, inverse_N)  # type: ignore[no-any-return]


def combine_rows(rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Each token's rows, added by weights that are rounded to the dtype of the rows.  -> y_TD"""
    if COMBINE.worthwhile(rows_ND, weights_TK, inverse_N, weights_TK.shape[0]):
        return _Combine.apply(rows_ND, weights_TK, inverse_N)  # type: ignore[no-any-return]
    T, K = weights_TK.shape
    out_KTD = spread_rows(rows_ND, inverse_N, order_N).view(K, T, -1)
    return (out_KTD * weights_TK.t()[..., None].to(rows_ND.dtype)).sum(0)


def _spread(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    return x_TD.index_select(0, order_N % x_TD.shape[0])


def _combine(rows_ND: Tensor, weights_TK: Tensor | None, inverse_N: Tensor, tokens: int) -> Tensor:
    out_KTD = rows_ND.index_select(0, inverse_N).view(-1, tokens, rows_ND.shape[1])
    if weights_TK is None:
        return out_KTD.sum(0)
    return (out_KTD * weights_TK.t()[..., None].to(rows_ND.dtype)).sum(0)


class _Spread(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.tokens = x_TD.shape[0]
        args = x_TD, order_N, inverse_N
        return torch.ops.treadle.spread_rows(*args) if SPREAD.worthwhile(*args) else _spread(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        args = grads[0], None, ctx.saved_tensors[0], ctx.tokens
        return torch.ops.treadle.combine_rows(*args) if COMBINE.worthwhile(*args) else _combine(*args), None, None


class _Combine(autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TK, inverse_N)
        return torch.ops.treadle.combine_rows(rows_ND, weights_TK, inverse_N, weights_TK.shape[0])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *torch.ops.treadle.combine_rows_backward(grads[0], *ctx.saved_tensors), None


def _order(T: int, K: int, device: str) -> tuple[Tensor, Tensor]:
    order_N = torch.randperm(T * K, device=device)
    return order_N, order_N.argsort()


def _spread_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    T, K, D = shape
    return torch.randn(T, D, dtype=dtype, device=device), *_order(T, K, device)


def _combine_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    T, K, D = shape
    weights_TK = torch.rand(T, K, device=device)
    return torch.randn(T * K, D, dtype=dtype, device=device), weights_TK, _order(T, K, device)[1], T


def _backward_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    rows_ND, weights_TK, inverse_N, T = _combine_arguments(shape, dtype, device)
    return torch.randn(T, shape[2], dtype=dtype, device=device), rows_ND, weights_TK, inverse_N


CHECKED = ((1, 1, 8), (5, 3, 40), (4, 8, 300), (3, 2, 2048))
TIMED = ((8192, 4, 2048), (8192, 8, 4096))

SPREAD = Operation(
    name="spread_rows",
    schema="(Tensor x, Tensor order, Tensor inverse) -> Tensor",
    module=__name__,
    reference=_spread,
    fake=lambda x, order, inverse: x.new_empty(order.shape[0], x.shape[1]),
    floor=lambda x, order, inverse: Floor(nbytes(x, order) + order.shape[0] * nbytes(x[:1]), 0),
    arguments=_spread_arguments,
    checked=CHECKED,
    timed=TIMED,
)

COMBINE = Operation(
    name="combine_rows",
    schema="(Tensor rows, Tensor? weights, Tensor inverse, int tokens) -> Tensor",
    module=__name__,
    reference=_combine,
    fake=lambda rows, weights, inverse, tokens: rows.new_empty(tokens, rows.shape[1]),
    floor=lambda rows, weights, inverse, tokens: Floor(
        nbytes(rows, weights, inverse) + tokens * nbytes(rows[:1]), 2 * rows.numel()
    ),
    arguments=_combine_arguments,
    checked=CHECKED,
    timed=TIMED,
)

Operation(
    name="combine_rows_backward",
    schema="(Tensor dy, Tensor rows, Tensor weights, Tensor inverse) -> (Tensor drows, Tensor dweights)",
    module=__name__,
    reference=Gradient(
        lambda dy, rows, weights, inverse: (
            lambda rows, weights: _combine(rows, weights, inverse, dy.shape[0]),
            (rows, weights),
            dy,
        )
    ),
    fake=lambda dy, rows, weights, inverse: (rows.new_empty(rows.shape), weights.new_empty(weights.shape)),
    floor=lambda dy, rows, weights, inverse: Floor(nbytes(dy, rows, rows, weights, weights, inverse), 3 * rows.numel()),
    arguments=_backward_arguments,
    checked=CHECKED,
    timed=TIMED,
)
