"""Normalisation over the last dimension D."""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from treadle import kernels
from treadle.nn.config import NormConfig

# A norm is built with (dim), or with (dim, heads): then x_..HD has a weight for each head, and each is normed alone.


class RMSNormConfig(NormConfig):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat = Field(1e-5, description="added to the mean square")
    offset: float = Field(0.0, description="added to the weight; 1: the stored weight starts at zero (Gemma)")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float32; see `treadle.kernels.rms_norm`.  x_..D -> y_..D"""

    roles = {"weight": "norm"}

    def __init__(self, config: RMSNormConfig, dim: int, heads: int | None = None):
        super().__init__()
        self.eps, self.offset = config.eps, config.offset
        self.weight = nn.Parameter(torch.full(_shape(dim, heads), 1.0 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps, self.offset)


class LayerNormConfig(NormConfig):
    """Layer norm (Ba et al. 2016, arXiv:1607.06450)."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = Field(1e-5, description="added to the variance")
    weight: bool = Field(True, description="learn a scale; false: none, and no shift (OLMo 1)")
    bias: bool = Field(True, description="learn a shift beside the scale")


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, computed in float32.  x_..D -> y_..D"""

    roles = {"weight": "norm", "bias": "norm"}

    def __init__(self, config: LayerNormConfig, dim: int, heads: int | None = None):
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(_shape(dim, heads))) if config.weight else None
        self.bias = nn.Parameter(torch.zeros(_shape(dim, heads))) if config.weight and config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


def _shape(dim: int, heads: int | None) -> tuple[int, ...]:
    return (dim,) if heads is None else (heads, dim)
