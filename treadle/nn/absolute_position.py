"""Positions as the residual stream sees them: a vector per position, added to the token's embedding.

B batch, S sequence, D model dim, J = D/2 frequencies.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.config import AbsolutePositionConfig
from treadle.nn.linear import Embedding
from treadle.nn.rope_scaling import rope_frequencies


class LearnedConfig(AbsolutePositionConfig):
    """A learned vector per position (GPT-2, OPT)."""

    kind: Literal["learned"] = "learned"
    length: PositiveInt | None = Field(None, description="positions that have a vector; null: the model's max_length")
    offset: NonNegativeInt = Field(0, description="rows before that of position 0; OPT has 2")


class Learned(nn.Module):
    """positions_BS -> x_BSD in `dtype`

    A position without a vector raises ConfigError on a CPU. On CUDA the values are not looked at, which would stop the
    host in every forward: the lookup kernel itself fails there, with a device-side assertion.
    """

    roles = {"table": "vocab"}

    def __init__(self, config: LearnedConfig, dim: int, max_length: int):
        super().__init__()
        self.length, self.offset = config.length or max_length, config.offset
        self.table = Embedding(self.length + self.offset, dim)

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Tensor:
        if positions_BS.device.type == "cpu" and not torch.compiler.is_compiling() and positions_BS.numel():
            last = int(positions_BS.max())
            if last >= self.length:
                raise ConfigError(
                    f"position {last} has no vector: the model's learned positions end at {self.length - 1}; "
                    "use shorter sequences, or train a model with a larger max_length or position.length"
                )
        return self.table(positions_BS + self.offset, dtype)


class SinusoidalConfig(AbsolutePositionConfig):
    """Sines and cosines of growing wavelengths, not learned (Vaswani et al. 2017, arXiv:1706.03762)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    theta: PositiveFloat = Field(10_000.0, description="base of the wavelengths")

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        if dim % 2:
            yield "kind", f"sinusoidal positions pair channels, and the model's dim={dim} is odd"


class Sinusoidal(nn.Module):
    """Channel 2j is sin(p / theta^(2j/D)), channel 2j + 1 its cosine.  positions_BS -> x_BSD in `dtype`"""

    def __init__(self, config: SinusoidalConfig, dim: int, max_length: int):
        super().__init__()
        self.theta, self.dim = config.theta, dim

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Tensor:
        angle_BSJ = positions_BS[..., None].double() * rope_frequencies(self.theta, self.dim, positions_BS.device)
        return torch.stack((angle_BSJ.sin(), angle_BSJ.cos()), dim=-1).flatten(-2).to(dtype)
