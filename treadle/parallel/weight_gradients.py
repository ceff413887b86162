"""Weight gradients that wait: a zero-bubble schedule runs the backward of the inputs first, and fills its gaps with the
gradients of the weights (Qi et al. 2023, arXiv:2401.10241).

PyTorch can split any backward in two by walking the graph; with FSDP its gradients are wrong without a word, and with
activation checkpointing a layer is recomputed many times. Here each linear layer forms the gradient of its input at
once and leaves that of its weight in a queue, of which the schedule takes what a backward has left. Everything else
(norms, biases, embedding, head) gets its gradient in the backward as ever.

N rows (of all leading dimensions), E experts, I inputs, O outputs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, autograd, nn

from treadle.kernels.grouped_linear import Implementation, grouped_linear, grouped_weight_gradient
from treadle.kernels.linear_cross_entropy import add_outer_products
from treadle.nn.linear import GroupedLinear, Linear


class WeightGradients:
    """What the linear layers of one stage have still to do. Each entry adds one gradient, and is run once."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def take(self) -> Callable[[], None]:
        """All that waits now, as one function. PyTorch asks for it after each backward (`dw_builder`)."""
        taken, self.waiting = self.waiting, []

        def run() -> None:
            while taken:
                taken.pop(0)()  # dropped at once: each holds activations

        return run


def defer_weight_gradients(modules: Iterable[nn.Module]) -> WeightGradients:
    """Let all linear layers of these modules leave the gradient of their weight to the queue that is returned.

    They are swapped in place for layers of the same kind that do; names, weights and what they compute stay. Comes
    before sharding. The compiler stays out of them: what they do in the backward would not survive it.
    """
    queue = WeightGradients()
    deferring: dict[type[nn.Module], type[nn.Module]] = {Linear: DeferringLinear, GroupedLinear: DeferringGroupedLinear}
    for module in modules:
        for layer in module.modules():
            if type(layer) in deferring:
                layer.__class__ = deferring[type(layer)]
                layer.queue = queue  # type: ignore[assignment]
    return queue


class DeferringLinear(Linear):
    queue: WeightGradients

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x, self.weight, self.queue)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class DeferringGroupedLinear(GroupedLinear):
    queue: WeightGradients

    @torch.compiler.disable
    def product(self, weight_EOI: Tensor, x_NI: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
        found: Tensor = _GroupedLinear.apply(x_NI, weight_EOI, ends_E, tail, self.implementation, self.queue)
        return found


class _Linear(autograd.Function):
    """x W^T. The weight is an input so that a node exists even where x needs no gradient; it gets none from here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.weight, ctx.queue = weight_OI, queue  # saved tensors come back as copies of themselves, without `.grad`
        return nn.functional.linear(x, weight_OI.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight_OI), weight = grads, ctx.saved_tensors, ctx.weight
        if ctx.needs_input_grad[1]:
            dy_NO, x_NI = dy.flatten(0, -2), x.flatten(0, -2)
            ctx.queue.waiting.append(lambda: add_outer_products(_gradient(weight), dy_NO, x_NI))
        return (dy @ weight_OI.to(dy.dtype) if ctx.needs_input_grad[0] else None), None, None


class _GroupedLinear(autograd.Function):
    """The same for `treadle.kernels.grouped_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_EOI: Tensor,
        ends_E: Tensor,
        tail: bool,
        implementation: Implementation,
        queue: WeightGradients,
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EOI, ends_E)
        ctx.weight, ctx.queue, ctx.tail, ctx.implementation = weight_EOI, queue, tail, implementation
        return grouped_linear(x_NI, weight_EOI.to(x_NI.dtype), ends_E, tail=tail, implementation=implementation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy_NO,), (x_NI, weight_EOI, ends_E) = grads, ctx.saved_tensors
        weight, how = ctx.weight, {"implementation": ctx.implementation}
        if ctx.needs_input_grad[1]:
            ctx.queue.waiting.append(
                lambda: _gradient(weight).add_(grouped_weight_gradient(dy_NO, x_NI, ends_E, **how))
            )
        dx_NI = None
        if ctx.needs_input_grad[0]:
            weight_EIO = weight_EOI.to(dy_NO.dtype).transpose(1, 2)
            dx_NI = grouped_linear(dy_NO, weight_EIO, ends_E, tail=ctx.tail, **how)
        return dx_NI, None, None, None, None, None


def _gradient(weight: Tensor) -> Tensor:
    """What a weight's gradient is added up in, at first zeros: in float32, also where FSDP's weight is narrower."""
    if weight.grad is None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.grad_dtype = wide
        weight.grad = torch.zeros_like(weight, dtype=wide)
    return weight.grad
