"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

B batch, S sequence, H heads, K head dim.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.nn.config import PositionConfig


class RopeConfig(PositionConfig):
    """Rotates pairs of channels by an angle that grows with the position."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = Field(10_000.0, description="base of the wavelengths")


class Rope(nn.Module):
    """Rotates queries and keys. Channel i is paired with channel i + K/2 (the 'half' layout of Llama's HF weights).

    Cosines and sines depend on positions alone: `tables` is computed once per forward and shared through the context by
    every layer with the same `key`.
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_length: int):
        super().__init__()
        self.theta, self.head_dim = config.theta, head_dim
        self.key = f"rope theta={config.theta} dim={head_dim}"

    def tables(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """positions_BS -> cos_BS1K, sin_BS1K in float32 (each frequency twice, for the two halves)"""
        # Frequencies in float64: at position 100,000 a float32 frequency is off by a visible angle.
        exponent_J = torch.arange(0, self.head_dim, 2, device=positions_BS.device, dtype=torch.float64) / self.head_dim
        angle_BSJ = positions_BS[..., None].double() * self.theta**-exponent_J
        angle_BS1K = torch.cat((angle_BSJ, angle_BSJ), dim=-1)[:, :, None]
        return angle_BS1K.cos().float(), angle_BS1K.sin().float()

    def forward(self, q_BSHK: Tensor, k_BSGK: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        cos_BS1K, sin_BS1K = context.tables.get(self.key) or self.tables(context.positions_BS)
        return rotate(q_BSHK, cos_BS1K, sin_BS1K), rotate(k_BSGK, cos_BS1K, sin_BS1K)

    def extra_repr(self) -> str:
        return self.key


def rotate(x_BSHK: Tensor, cos_BS1K: Tensor, sin_BS1K: Tensor) -> Tensor:
    """Rotate each pair (i, i + K/2) of channels, in the dtype of the tables; returns the dtype of x."""
    x = x_BSHK.to(cos_BS1K.dtype)
    first, second = x.chunk(2, dim=-1)
    return (x * cos_BS1K + torch.cat((-second, first), dim=-1) * sin_BS1K).to(x_BSHK.dtype)
