"""The families of building blocks, as configuration. A member is one file: its config class, its module, its facts.

A config named `XConfig` builds the module `X` of its own file: `config.build(...)` hands itself over as first argument.
"""

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from treadle.config import Kind


class Buildable:
    """Gives a config `build`: it constructs the class of the same file and name, less the ending `Config`."""

    def build(self, *args: Any, **kwargs: Any) -> Any:
        module, name = sys.modules[type(self).__module__], type(self).__name__.removesuffix("Config")
        return getattr(module, name)(self, *args, **kwargs)


class NormConfig(Buildable, Kind):
    """Normalisation over the last dimension. Builds with (dim), or with (dim, heads) for a weight per head."""


class PositionConfig(Buildable, Kind):
    """Positions as attention sees them. Builds with (head_dim, max_length)."""

    def problems(self, head_dim: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible at this head dim; key `head_dim` blames that."""
        yield from ()


class AbsolutePositionConfig(Buildable, Kind):
    """Positions as the residual stream sees them. Builds with (dim, max_length)."""

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible at this model dim."""
        yield from ()


class MixerConfig(Buildable, Kind):
    """Moves information between positions: attention and its kin. Builds with (dim, max_length).

    in_parts: whether the module may be given a part of each row, the rest being with other ranks (`context.parts`). It
    may if it reads other tokens only through `attend`, and where its tokens stand only from the context.
    """

    in_parts: ClassVar[bool] = False

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible at this model dim."""
        yield from ()


class FeedForwardConfig(Buildable, Kind):
    """Works on each position alone. Builds with (dim)."""

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible at this model dim."""
        yield from ()


class RouterConfig(Buildable, Kind):
    """Sends tokens to experts. Builds with (dim, experts, top_k, biased=)."""

    def problems(self, experts: int, top_k: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible with this number of experts."""
        yield from ()


class LayerConfig(Buildable, Kind):
    """One entry of the stack: a layer, or a pattern of layers. Builds one layer with (dim, max_length)."""

    repeat: PositiveInt = Field(1, description="how many times in a row this entry stands in the stack")

    def expand(self) -> list["LayerConfig"]:
        """The layers of this entry, one by one."""
        return [self.model_copy(update={"repeat": 1})] * self.repeat

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible at this model dim."""
        yield from ()


class MultiTokenConfig(Buildable, Kind):
    """Predicts further than the next token, in training. Builds with (dim, max_length, the last layer's config)."""

    depth: PositiveInt = Field(1, description="how many tokens further than the next one are predicted")
    weight: PositiveFloat = Field(0.3, description="of their mean cross entropy, beside the next token's")

    def problems(self, dim: int, max_length: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible at this model dim and longest sequence."""
        if self.depth >= max_length:
            yield "depth", f"{self.depth} is further than a sequence of max_length={max_length} reaches; lower it"
