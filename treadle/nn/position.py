"""Positions as attention sees them: rotary embedding (Su et al. 2021, arXiv:2104.09864), ALiBi (arXiv:2108.12409).

B batch, S sequence, H heads, K head dim, R rotated channels of a head, J = R/2 frequencies.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from treadle import kernels
from treadle.attention import AttentionContext
from treadle.kernels.rope import Layout
from treadle.nn.config import PositionConfig
from treadle.nn.norm import RMSNorm
from treadle.nn.rope_scaling import RopeScalingConfig, rope_frequencies


class RopeConfig(PositionConfig):
    """Rotates pairs of channels by an angle that grows with the position."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = Field(10_000.0, description="base of the wavelengths")
    partial: PositiveFloat = Field(
        1.0, le=1, description="share of the head dim that is rotated, from its first channel"
    )
    layout: Layout = Field("half", description="half pairs channels i and i + R/2 (Llama), interleaved 2i and 2i + 1")
    scaling: RopeScalingConfig | None = Field(None, description="how longer contexts are reached; null: not")

    def rotated(self, head_dim: int) -> int:
        """How many channels of a head are rotated."""
        return int(head_dim * self.partial)

    def problems(self, head_dim: int) -> Iterator[tuple[str, str]]:
        rotated = self.rotated(head_dim)
        if rotated % 2 and rotated == head_dim:
            yield "head_dim", "is odd; rotary positions pair channels, so make it even"
        elif rotated % 2 or not rotated:
            yield (
                "partial",
                f"{self.partial} of head dim {head_dim} is {rotated} channels; choose an even number of them",
            )
        elif self.scaling is not None:
            yield from ((f"scaling.{key}", message) for key, message in self.scaling.problems(rotated))


class Rope(nn.Module):
    """Rotates queries and keys.

    Cosines and sines depend on positions alone: `tables` is computed once per forward and shared through the context by
    every layer with the same `key`.
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_length: int):
        super().__init__()
        self.theta, self.layout, self.rotated = config.theta, config.layout, config.rotated(head_dim)
        scaling = config.scaling
        self.scaling: Any = scaling.build(self.theta, self.rotated, max_length) if scaling is not None else None
        self.label = f"theta={self.theta} rotated={self.rotated} layout={self.layout}"
        self.key = f"rope {self.label} scaling={scaling!r} max_length={max_length}"

    def tables(self, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """-> cos_BS1R, sin_BS1R in float32 (each frequency twice, for the two channels of its pair)"""
        if self.scaling is None:
            frequencies = rope_frequencies(self.theta, self.rotated, context.positions_BS.device)
        else:
            frequencies = self.scaling.frequencies(context)
        angle_BSJ = context.positions_BS[..., None].double() * frequencies
        if self.layout == "half":
            angle_BS1R = torch.cat((angle_BSJ, angle_BSJ), dim=-1)[:, :, None]
        else:
            angle_BS1R = angle_BSJ.repeat_interleave(2, dim=-1)[:, :, None]
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        return (magnitude * angle_BS1R.cos()).float(), (magnitude * angle_BS1R.sin()).float()

    def forward(
        self, q_BSHK: Tensor, k_BSGK: Tensor, context: AttentionContext, norms: tuple[RMSNorm, RMSNorm] | None = None
    ) -> tuple[Tensor, Tensor]:
        """norms: of queries and keys, with a weight for all heads, taken before the rotation, in one pass with it."""
        cos_BS1R, sin_BS1R = context.tables.get(self.key) or self.tables(context)
        if norms is None:
            return kernels.rope(q_BSHK, k_BSGK, cos_BS1R, sin_BS1R, self.layout)
        q_norm, k_norm = norms
        return kernels.rope(
            q_BSHK,
            k_BSGK,
            cos_BS1R,
            sin_BS1R,
            self.layout,
            norms=(q_norm.weight, k_norm.weight),
            eps=q_norm.eps,
            offset=q_norm.offset,
        )

    def extra_repr(self) -> str:
        return self.label if self.scaling is None else f"{self.label} scaling={type(self.scaling).__name__}"


class AlibiConfig(PositionConfig):
    """Attention fades linearly with distance, at a slope per head; nothing is rotated (arXiv:2108.12409)."""

    kind: Literal["alibi"] = "alibi"
    scale: PositiveFloat = Field(1.0, description="factor on every slope; Falcon has 1/sqrt(head dim)")


class Alibi(nn.Module):
    """Leaves queries and keys as they are: the bias is a fact of the attention (`AttentionFacts.alibi`)."""

    def __init__(self, config: AlibiConfig, head_dim: int, max_length: int):
        super().__init__()

    def forward(self, q_BSHK: Tensor, k_BSGK: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        return q_BSHK, k_BSGK
