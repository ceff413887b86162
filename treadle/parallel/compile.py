"""torch.compile, layer by layer: equal layers share one compiled function, so start-up does not grow with depth."""

import torch
from torch import nn


def compile_layers(layers: nn.ModuleDict, *, backend: str = "inductor") -> None:
    """Compile each layer in place, for static shapes. Compilation happens at the first call."""
    _allow_kinds()
    for layer in layers.values():
        layer.compile(backend=backend, dynamic=False)


def compile_between(layers: nn.ModuleDict, *, backend: str = "inductor") -> None:
    """Compile what lies between the matmuls of each layer, where those defer their weight gradients and stay out.

    Comes before activation checkpointing: a layer in pieces cannot be compiled around its recomputation.
    """
    _allow_kinds()
    for layer in layers.values():
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def _allow_kinds() -> None:
    # Kinds of layers times train/eval, with room: the default of 8 would silently fall back to eager beyond it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
