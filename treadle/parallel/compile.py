"""torch.compile, layer by layer: equal layers share one compiled function, so start-up does not grow with depth."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import nn


def compile_layers(
    layers: nn.ModuleDict,
    *,
    backend: str | Callable[..., Any] = "inductor",
    apart: Sequence[nn.Module] = (),
    budget: float | None = None,
) -> None:
    """Compile each layer in place, for static shapes. Compilation happens at the first call.

    budget: share of the activations that may be kept for the backward, 0 to 1; None: as the compiler sees fit.
    apart: modules whose own forward is to be left alone. What is around and inside them is compiled in pieces: a break
    within a layer that recomputes its activations would leave all of it uncompiled without a word.
    """
    _allow_kinds()
    backend = backend if budget is None else _within(budget, backend)
    for layer in layers.values():
        for piece in _pieces(layer, set(apart)):
            piece.compile(backend=backend, dynamic=False)


def compile_between(
    layers: nn.ModuleDict, *, backend: str | Callable[..., Any] = "inductor", budget: float | None = None
) -> None:
    """Compile what lies between the matmuls of each layer, where those defer their weight gradients and stay out.

    Comes before activation checkpointing: a layer in pieces cannot be compiled around its recomputation.
    """
    _allow_kinds()
    backend = backend if budget is None else _within(budget, backend)
    for layer in layers.values():
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def _within(budget: float, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The backend, which decides what is kept under this budget. The setting is the compiler's own and global: it holds
    while a layer of this run is compiled, and for nothing else."""
    compiler: Any = torch._dynamo.lookup_backend(backend)

    def compiled(graph: Any, inputs: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compiler(graph, inputs)

    return compiled


def _pieces(module: nn.Module, apart: set[nn.Module]) -> Iterator[nn.Module]:
    if apart.isdisjoint(module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _pieces(child, apart)


def _allow_kinds() -> None:
    # Kinds of layers times train/eval, with room: the default of 8 would silently fall back to eager beyond it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
