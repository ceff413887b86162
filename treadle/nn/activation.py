"""Elementwise activations, and gates made of them, by name."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid"]
GatedActivation = Literal[Activation, "clamped_silu"]


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


def gated(gate: Tensor, up: Tensor, name: GatedActivation) -> Tensor:
    """activation(gate) * up.

    `clamped_silu` is GPT-OSS's (arXiv:2508.10925): with the gate up to 7 and the other in -7 ... 7,
    gate * sigmoid(1.702 * gate) * (up + 1).
    """
    if name == "clamped_silu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return activate(gate, name) * up
