"""torch.compile, layer by layer: equal layers share one compiled function, so start-up does not grow with depth."""

from collections.abc import Iterator, Sequence

import torch
import torch._functorch.config
from torch import nn


def compile_layers(layers: nn.ModuleDict, *, backend: str = "inductor", apart: Sequence[nn.Module] = ()) -> None:
    """Compile each layer in place, for static shapes. Compilation happens at the first call.

    apart: modules whose own forward is to be left alone. What is around and inside them is compiled in pieces: a break
    within a layer that recomputes its activations would leave all of it uncompiled without a word.
    """
    _configure()
    for layer in layers.values():
        for piece in _pieces(layer, set(apart)):
            piece.compile(backend=backend, dynamic=False)


def compile_between(layers: nn.ModuleDict, *, backend: str = "inductor") -> None:
    """Compile what lies between the matmuls of each layer, where those defer their weight gradients and stay out.

    Comes before activation checkpointing: a layer in pieces cannot be compiled around its recomputation.
    """
    _configure()
    for layer in layers.values():
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def _pieces(module: nn.Module, apart: set[nn.Module]) -> Iterator[nn.Module]:
    if apart.isdisjoint(module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _pieces(child, apart)


def _configure() -> None:
    # Kinds of layers times train/eval, with room: the default of 8 would silently fall back to eager beyond it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # What is cheap to form again is not kept for a matmul of the backward either: activations, normed inputs, and the
    # weights in the compute dtype. Half of a layer's memory, for a few passes over what the backward reads anyway.
    torch._functorch.config.ban_recompute_materialized_backward = False
