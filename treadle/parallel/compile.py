"""torch.compile, layer by layer: equal layers share one compiled function, so start-up does not grow with depth."""

import torch
from torch import nn


def compile_layers(layers: nn.ModuleDict, *, backend: str = "inductor") -> None:
    """Compile each layer in place, for static shapes. Compilation happens at the first call."""
    # Kinds of layers times train/eval, with room: the default of 8 would silently fall back to eager beyond it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers.values():
        layer.compile(backend=backend, dynamic=False)
