"""Gathers and scattered sums over processes, as autograd, `torch.compile` and activation checkpointing know them.

PyTorch has such functions. These differ in three things: the operators below them are named alike in all its versions;
all that is given starts before any of it is waited for, in the backward too; and what comes out of order is moved once,
or not at all where there is one row. Gradients are made contiguous, which torch 2.11 demands and does not see to.

All are waited for before they are returned: torch 2.13 gets gradients wrong of unfinished results that enter a compiled
region.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines the operators
from torch import Tensor, autograd


def gather(tensors: Sequence[Tensor], dim: int, group: Any, size: int) -> list[Tensor]:
    """Of each tensor the parts of all `size` processes of the group, one after the other.

    Backward: gradients are summed, and each process has that of its part. group: the name of it.
    """
    found = _Gather.apply(group, size, *tensors)
    return [y.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1) for y in found]


def sum_scatter(tensors: Sequence[Tensor], dim: int, group: Any, size: int) -> list[Tensor]:
    """Of each tensor this process's part of the sum over the group. Backward: gradients are gathered."""
    return list(
        _Scatter.apply(group, size, *[x.unflatten(dim, (size, -1)).movedim(dim, 0).flatten(0, 1) for x in tensors])
    )


class _Gather(autograd.Function):
    """Along the first dimension, as it lies in memory."""

    @staticmethod
    def forward(ctx: Any, group: Any, size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.size = group, size
        return _gathered(tensors, group, size)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, None, *_scattered(grads, ctx.group, ctx.size)


class _Scatter(autograd.Function):
    """The same."""

    @staticmethod
    def forward(ctx: Any, group: Any, size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.size = group, size
        return _scattered(tensors, group, size)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, None, *_gathered(grads, ctx.group, ctx.size)


def _gathered(tensors: Sequence[Tensor], group: Any, size: int) -> tuple[Tensor, ...]:
    start, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
    started = [start(x.contiguous(), size, group) for x in tensors]
    return tuple([wait(y) for y in started])


def _scattered(tensors: Sequence[Tensor], group: Any, size: int) -> tuple[Tensor, ...]:
    start, wait = torch.ops._c10d_functional.reduce_scatter_tensor, torch.ops._c10d_functional.wait_tensor
    started = [start(x.contiguous(), "sum", size, group) for x in tensors]
    return tuple([wait(y) for y in started])
