"""Layers of the stack: how a mixer and a feed-forward are put around the residual stream.

B batch, S sequence, D model dim.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.nn.config import FeedForwardConfig, LayerConfig, MixerConfig, NormConfig
from treadle.nn.norm import RMSNormConfig


class PreNormConfig(LayerConfig):
    """x + mixer(norm(x)), then x + feedforward(norm(x)) (Xiong et al. 2020, arXiv:2002.04745)."""

    kind: Literal["pre_norm"] = "pre_norm"
    mixer: MixerConfig
    feedforward: FeedForwardConfig
    norm: NormConfig = Field(RMSNormConfig(), description="the norm before each of the two")

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        for name, part in (("mixer", self.mixer), ("feedforward", self.feedforward)):
            yield from ((f"{name}.{key}", message) for key, message in part.problems(dim))


class PreNorm(nn.Module):
    """A pre-norm layer.  x_BSD -> y_BSD"""

    roles: dict[str, str] = {}

    def __init__(self, config: PreNormConfig, dim: int, max_length: int):
        super().__init__()
        self.mixer_norm = config.norm.build(dim)
        self.mixer = config.mixer.build(dim, max_length)
        self.feedforward_norm = config.norm.build(dim)
        self.feedforward = config.feedforward.build(dim)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        x_BSD = x_BSD + self.mixer(self.mixer_norm(x_BSD), context)
        return x_BSD + self.feedforward(self.feedforward_norm(x_BSD))


class CycleConfig(LayerConfig):
    """A pattern of layers, `repeat` times over: five local layers then one global, say."""

    kind: Literal["cycle"] = "cycle"
    layers: list[LayerConfig] = Field(min_length=1, description="the pattern, in order")

    def expand(self) -> list[LayerConfig]:
        return [layer for entry in self.layers for layer in entry.expand()] * self.repeat

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        for index, layer in enumerate(self.layers):
            yield from ((f"layers.{index}.{key}", message) for key, message in layer.problems(dim))
