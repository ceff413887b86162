"""Linear layers with updates: the same module, whose class has got a part of ours before its own.

So names, weights and all that others have made of the layer stay: a layer that multiplies in fp8, or leaves its weight
gradient to a schedule, goes on doing so, and one that is cut between processes is cut with its updates.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from treadle.nn.linear import GroupedLinear, Linear


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Adapted(nn.Module):
    """updates: by part. applied: whether they take part. kept: the layer's own tensors, while updates are in them."""

    updates: nn.ModuleDict
    applied: bool
    kept: dict[str, Tensor]
    parts: dict[str, int]

    def each_part(self, y: Tensor, function: Callable[[Any, Tensor, int], Tensor]) -> Tensor:
        """`function(update, its features of y, number of the part)` in the place of these features."""
        names = list(self.parts)
        if not names:
            return function(self.updates["all"], y, 0)
        ys = list(y.split(_sizes(self), dim=-1))
        for name, update in self.updates.items():
            number = names.index(name)
            ys[number] = function(update, ys[number], number)
        return torch.cat(ys, dim=-1)

    def merged(self, leaf: str, values: Tensor) -> Tensor:
        """The weight or the bias with the updates in it, where `values` is what it is without. All are whole."""
        dim = values.ndim - (1 if leaf == "bias" else 2)
        rows = list(wide(values).split(list(self.parts.values()) or values.shape[dim], dim=dim))
        for name, update in self.updates.items():
            number = list(self.parts).index(name) if self.parts else 0
            function = getattr(update, "merged" if leaf == "weight" else "merged_bias", None)
            rows[number] = rows[number] if function is None else function(rows[number])
        return torch.cat(rows, dim=dim).to(values.dtype)


class AdaptedLinear(Adapted):
    bias: Tensor | None
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def product(self, x: Tensor, *multiply: Any) -> Tensor:
        y: Tensor = super().product(x, *multiply)  # type: ignore[misc]
        if not self.applied:
            return y

        @functools.cache
        def weights() -> tuple[Tensor, ...]:
            return self.weight.split(_sizes(self)) if self.parts else (self.weight,)

        return self.each_part(y, lambda update, y, number: update(x, y, lambda: weights()[number]))


class ScaledLinear(Adapted):
    """Its updates are factors, on its outputs with their bias, or on its inputs."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        if not self.applied or self._on_inputs:
            return y
        return self.each_part(y, lambda update, y, _: update(y))

    def product(self, x: Tensor, *multiply: Any) -> Tensor:
        x = self.updates["all"](x) if self.applied and self._on_inputs else x
        return super().product(x, *multiply)  # type: ignore[misc,no-any-return]

    @property
    def _on_inputs(self) -> bool:
        return "all" in self.updates and bool(self.updates["all"].inputs)


class AdaptedGrouped(Adapted):
    def multiply(
        self, weight_EOI: Tensor, bias_EO: Tensor | None, x_NI: Tensor, ends_E: Tensor, *, tail: bool
    ) -> Tensor:
        y_NO: Tensor = super().multiply(weight_EOI, bias_EO, x_NI, ends_E, tail=tail)  # type: ignore[misc]
        if not self.applied:
            return y_NO
        return self.each_part(y_NO, lambda update, y_NO, _: update(x_NI, y_NO, ends_E, tail))


def adapt(layer: Any, form: type[Adapted], updates: dict[str, nn.Module]) -> None:
    """Give a layer these updates, in place."""
    layer.__class__ = _class(type(layer), form)  # type: ignore[arg-type]
    layer.updates, layer.applied, layer.kept = nn.ModuleDict(updates), True, {}


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with updates, by path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Adapted))


@functools.cache
def _class(kind: type, form: type) -> type:
    assert issubclass(kind, Linear | GroupedLinear)
    return type(f"Adapted{kind.__name__}", (form, kind), {})


def _sizes(layer: Any) -> list[int]:
    """How many features of each part are here."""
    view = getattr(layer, "views", {}).get("weight")  # of a layer that is cut between processes
    return list(layer.parts.values()) if view is None else view.rows(layer.parts, layer.peers)
