"""Elementwise activations, by name."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid"]


def activate(x: Tensor, name: Activation) -> Tensor:
    """Apply an activation. `gelu` is exact (erf), `gelu_tanh` its tanh form, `relu2` ReLU squared (2109.08668)."""
    match name:
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "sigmoid":
            return torch.sigmoid(x)
    raise ValueError(f"unknown activation '{name}'; known: {', '.join(get_args(Activation))}")
