"""Weight gradients that wait: a zero-bubble schedule runs the backward of the inputs first, and fills its gaps with the
gradients of the weights (Qi et al. 2023, arXiv:2401.10241).

PyTorch can split any backward in two by walking the graph; with FSDP its gradients are wrong without a word, and with
activation checkpointing a layer is recomputed many times. Here each linear layer forms the gradient of its input at
once and leaves that of its weight in a queue, of which the schedule takes what a backward has left. Everything else
(norms, biases, embedding, head) gets its gradient in the backward as ever.

N rows (of all leading dimensions), E experts, I inputs, O outputs.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, autograd, nn

from treadle.kernels.grouped_linear import Implementation, grouped_linear, grouped_weight_gradient
from treadle.kernels.linear_cross_entropy import add_outer_products
from treadle.nn.linear import GroupedLinear, Linear
from treadle.parallel.collectives import Later
from treadle.parallel.shards import local, spread_like


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

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @torch.compiler.disable
    def product(self, x: Tensor, multiply: Callable[..., Tensor] | None = None) -> Tensor:
        total = Total(self)

        def later(dy: Tensor, x: Tensor) -> None:
            dy_NO, x_NI = dy.flatten(0, -2), x.flatten(0, -2)
            self.queue.waiting.append(lambda: total.add(lambda sum_OI: add_outer_products(sum_OI, dy_NO, x_NI)))

        return (multiply or _Linear.apply)(x, apart(self.weight), later)  # type: ignore[no-any-return]


class DeferringGroupedLinear(GroupedLinear):
    queue: WeightGradients

    @torch.compiler.disable
    def product(self, weight_EOI: Tensor, x_NI: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
        total, how = Total(self), self.implementation

        def later(dy_NO: Tensor, x_NI: Tensor) -> None:
            def add(sum_EOI: Tensor) -> None:
                sum_EOI.add_(grouped_weight_gradient(dy_NO, x_NI, ends_E, implementation=how))

            self.queue.waiting.append(lambda: total.add(add))

        found: Tensor = _GroupedLinear.apply(x_NI, apart(weight_EOI), ends_E, tail, how, later)
        return found


def apart(weight: Tensor) -> Tensor:
    """The weight as a leaf of its own: it gets no gradient from the backward, and nor does what it was made of. An
    input nevertheless, so that a node exists even where x needs no gradient."""
    return weight.detach().requires_grad_(weight.requires_grad)


class _Linear(autograd.Function):
    """x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, later: Later) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.later = later
        return nn.functional.linear(x, weight_OI.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight_OI) = grads, ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.later(dy, x)
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
        later: Later,
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EOI, ends_E)
        ctx.later, ctx.tail, ctx.implementation = later, tail, implementation
        return grouped_linear(x_NI, weight_EOI.to(x_NI.dtype), ends_E, tail=tail, implementation=implementation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy_NO,), (x_NI, weight_EOI, ends_E) = grads, ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.later(dy_NO, x_NI)
        dx_NI = None
        if ctx.needs_input_grad[0]:
            weight_EIO = weight_EOI.to(dy_NO.dtype).transpose(1, 2)
            dx_NI = grouped_linear(dy_NO, weight_EIO, ends_E, tail=ctx.tail, implementation=ctx.implementation)
        return dx_NI, None, None, None, None, None


class Total:
    """What the gradients of a layer's weight are added up in. Made in the forward, where the weight is at hand: when
    its gradient's turn comes, FSDP may have put another in its place."""

    def __init__(self, layer: nn.Module):
        self.weight = layer._parameters["weight"]
        self.view, self.peers = getattr(layer, "views", {}).get("weight"), getattr(layer, "peers", None)

    def add(self, add: Callable[[Tensor], Any]) -> None:
        """add: to a tensor of the shape that the layer has seen of its weight."""
        mine = _gradient(cast(nn.Parameter, self.weight))
        if self.view is None:
            add(mine)
        else:
            self.view.add_gradient(mine, add, self.peers)


def _gradient(weight: nn.Parameter) -> Tensor:
    """What is here of a weight's gradient, at first zeros: in float32, also where FSDP's weight is narrower."""
    if weight.grad is None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.grad_dtype = wide
        zeros = torch.zeros_like(local(weight), dtype=wide)
        weight.grad = spread_like(zeros, weight, gradient=True)
    return local(weight.grad)
