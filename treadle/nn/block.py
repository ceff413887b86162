"""Layers of the stack: how a mixer and a feed-forward are put around the residual stream.

Each kind is the line of its docstring, with f the mixer and then the feed-forward:

    pre_norm        x + f(norm(x))
    post_norm       norm(x + f(x))
    reordered_norm  x + norm(f(x))
    sandwich        x + norm(f(norm(x)))
    parallel        x + mixer(norm(x)) + feedforward(norm(x))

B batch, S sequence, D model dim.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.nn.config import FeedForwardConfig, LayerConfig, MixerConfig, NormConfig
from treadle.nn.norm import RMSNormConfig


class ResidualLayerConfig(LayerConfig):
    """What the kinds of layers below share."""

    mixer: MixerConfig
    feedforward: FeedForwardConfig
    norm: NormConfig = Field(RMSNormConfig(), description="every norm of the layer that is on the model dim")
    residual_scale: PositiveFloat = Field(
        1.0, description="factor on what mixer and feed-forward each add to the residual stream (Granite)"
    )

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        for name, part in (("mixer", self.mixer), ("feedforward", self.feedforward)):
            yield from ((f"{name}.{key}", message) for key, message in part.problems(dim))


class ResidualLayer(nn.Module):
    """The parts that the kinds below put around the residual stream, each in its own `forward`."""

    roles: dict[str, str] = {}

    def __init__(self, config: ResidualLayerConfig, dim: int, max_length: int):
        super().__init__()
        self.scale = config.residual_scale
        self.mixer_norm = config.norm.build(dim)
        self.mixer = config.mixer.build(dim, max_length)
        self.feedforward_norm = config.norm.build(dim)
        self.feedforward = config.feedforward.build(dim)

    def add(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        return x_BSD + (y_BSD if self.scale == 1.0 else self.scale * y_BSD)


class PreNormConfig(ResidualLayerConfig):
    """x + mixer(norm(x)), then x + feedforward(norm(x)) (Xiong et al. 2020, arXiv:2002.04745)."""

    kind: Literal["pre_norm"] = "pre_norm"


class PreNorm(ResidualLayer):
    """A pre-norm layer: GPT-2, Llama, Qwen, Mixtral, DeepSeek.  x_BSD -> y_BSD"""

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        x_BSD = self.add(x_BSD, self.mixer(self.mixer_norm(x_BSD), context))
        return self.add(x_BSD, self.feedforward(self.feedforward_norm(x_BSD)))


class PostNormConfig(ResidualLayerConfig):
    """norm(x + mixer(x)), then norm(x + feedforward(x)): the residual stream itself is normed (arXiv:1706.03762)."""

    kind: Literal["post_norm"] = "post_norm"


class PostNorm(ResidualLayer):
    """The original transformer's layer: BERT, GPT-1. Needs a warm-up of the learning rate.  x_BSD -> y_BSD"""

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        x_BSD = self.mixer_norm(self.add(x_BSD, self.mixer(x_BSD, context)))
        return self.feedforward_norm(self.add(x_BSD, self.feedforward(x_BSD)))


class ReorderedNormConfig(ResidualLayerConfig):
    """x + norm(mixer(x)), then x + norm(feedforward(x)): what is added is normed (OLMo 2, arXiv:2501.00656)."""

    kind: Literal["reordered_norm"] = "reordered_norm"


class ReorderedNorm(ResidualLayer):
    """OLMo 2's and Swin v2's (arXiv:2111.09883) layer: the residual stream is never normed.  x_BSD -> y_BSD"""

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        x_BSD = self.add(x_BSD, self.mixer_norm(self.mixer(x_BSD, context)))
        return self.add(x_BSD, self.feedforward_norm(self.feedforward(x_BSD)))


class SandwichConfig(ResidualLayerConfig):
    """x + norm(mixer(norm(x))), then x + norm(feedforward(norm(x))) (CogView, arXiv:2105.13290; Gemma 2 and 3)."""

    kind: Literal["sandwich"] = "sandwich"


class Sandwich(ResidualLayer):
    """A norm before and after each of the two, four in all.  x_BSD -> y_BSD"""

    def __init__(self, config: SandwichConfig, dim: int, max_length: int):
        super().__init__(config, dim, max_length)
        self.mixer_output_norm = config.norm.build(dim)
        self.feedforward_output_norm = config.norm.build(dim)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        x_BSD = self.add(x_BSD, self.mixer_output_norm(self.mixer(self.mixer_norm(x_BSD), context)))
        return self.add(x_BSD, self.feedforward_output_norm(self.feedforward(self.feedforward_norm(x_BSD))))


class ParallelConfig(ResidualLayerConfig):
    """x + mixer(norm(x)) + feedforward(norm(x)): both read the same input (GPT-J; PaLM, arXiv:2204.02311)."""

    kind: Literal["parallel"] = "parallel"
    shared_norm: bool = Field(
        True, description="one norm for both (GPT-J, Falcon, Phi, Cohere); false: one each (GPT-NeoX)"
    )


class Parallel(ResidualLayer):
    """Mixer and feed-forward side by side.  x_BSD -> y_BSD"""

    def __init__(self, config: ParallelConfig, dim: int, max_length: int):
        super().__init__(config, dim, max_length)
        if config.shared_norm:
            self.feedforward_norm = None

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        normed_BSD = self.mixer_norm(x_BSD)
        mixed_BSD = self.mixer(normed_BSD, context)
        if self.feedforward_norm is not None:
            normed_BSD = self.feedforward_norm(x_BSD)
        return self.add(x_BSD, mixed_BSD + self.feedforward(normed_BSD))


class CycleConfig(LayerConfig):
    """A pattern of layers, `repeat` times over: five local layers then one global, say."""

    kind: Literal["cycle"] = "cycle"
    layers: list[LayerConfig] = Field(min_length=1, description="the pattern, in order")

    def expand(self) -> list[LayerConfig]:
        return [layer for entry in self.layers for layer in entry.expand()] * self.repeat

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        for index, layer in enumerate(self.layers):
            yield from ((f"layers.{index}.{key}", message) for key, message in layer.problems(dim))
