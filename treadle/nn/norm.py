"""Normalisation over the last dimension D."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from treadle.nn.config import NormConfig


class RMSNormConfig(NormConfig):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat = Field(1e-5, description="added to the mean square")
    offset: float = Field(0.0, description="added to the weight; 1: the stored weight starts at zero (Gemma)")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float32 but for the weight, which has x's dtype."""

    roles = {"weight": "norm"}

    def __init__(self, config: RMSNormConfig, dim: int):
        super().__init__()
        self.eps, self.offset = config.eps, config.offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.offset == 0.0 else self.weight + self.offset
        return F.rms_norm(x, self.weight.shape, weight.to(x.dtype), self.eps)


class LayerNormConfig(NormConfig):
    """Layer norm (Ba et al. 2016, arXiv:1607.06450)."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = Field(1e-5, description="added to the variance")
    bias: bool = Field(True, description="learn a shift beside the scale")


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, computed in float32.  x_..D -> y_..D"""

    roles = {"weight": "norm", "bias": "norm"}

    def __init__(self, config: LayerNormConfig, dim: int):
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)
