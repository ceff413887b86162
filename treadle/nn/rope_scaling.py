"""How rotary embeddings reach beyond the length that a model was trained at: other frequencies, other magnitudes.

Parameters and formulas are those of transformers' `modeling_rope_utils`, with `original_length` for
`original_max_position_embeddings` and the model's `max_length` for `max_position_embeddings`.

B batch, S sequence, J number of frequencies: half of the rotated channels.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from treadle.attention import AttentionContext
from treadle.config import Kind
from treadle.config.base import key_error
from treadle.nn.config import Buildable


def rope_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """theta^(-2j/dim): radians per position.  -> frequencies_J in float64

    In float64 because at position 100,000 a float32 frequency is off by a visible angle.
    """
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)


def document_lengths(context: AttentionContext) -> Tensor:
    """How long each token's document is by now, cached tokens included: its last position + 1.  -> lengths_BS1

    This is what the length-dependent scalings look at. Each row and each packed document counts alone, so that what
    stands beside a document never changes it. No value leaves the device.
    """
    if context.parts is not None:  # the rest of a document may be with other ranks
        lengths_BT1 = document_lengths(context.whole)
        return lengths_BT1 if lengths_BT1.shape[1] == 1 else context.parts.cut(lengths_BT1)
    positions_BS, documents_BS = context.positions_BS, context.documents_BS
    if documents_BS is None:
        return (positions_BS.amax(dim=1, keepdim=True) + 1)[..., None]
    S = positions_BS.shape[1]
    last_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    last_BS[:, :-1] = documents_BS[:, 1:] != documents_BS[:, :-1]
    index_BS = torch.where(last_BS, torch.arange(S, device=positions_BS.device), S)
    next_last_BS = index_BS.flip(1).cummin(dim=1).values.flip(1)
    return (positions_BS.gather(1, next_last_BS) + 1)[..., None]


class RopeScalingConfig(Buildable, Kind):
    """Frequencies and magnitude of a rotation. Builds with (theta, dim, max_length), dim the rotated channels."""

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible when `dim` channels are rotated."""
        yield from ()


class LinearScalingConfig(RopeScalingConfig):
    """Positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat = Field(description="by how much longer the context gets")


class LinearScaling:
    def __init__(self, config: LinearScalingConfig, theta: float, dim: int, max_length: int):
        self.theta, self.dim, self.factor, self.magnitude = theta, dim, config.factor, 1.0

    def frequencies(self, context: AttentionContext) -> Tensor:
        """-> frequencies_J"""
        return rope_frequencies(self.theta, self.dim, context.positions_BS.device) / self.factor


class DynamicNTKScalingConfig(RopeScalingConfig):
    """A larger theta once a document is longer than the original length, larger the longer it is.

    In generation, keys stay in the cache as they were rotated, as in transformers. The length is that of the document
    so far, so a document that is read at once and one that is generated see other frequencies beyond the original.
    """

    kind: Literal["dynamic_ntk"] = "dynamic_ntk"
    factor: PositiveFloat = Field(description="by how much longer the context gets")
    original_length: PositiveInt | None = Field(None, description="unchanged up to here; null: the model's max_length")

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        if dim < 4:
            yield "kind", f"dynamic_ntk needs at least 4 rotated channels, there are {dim}"


class DynamicNTKScaling:
    def __init__(self, config: DynamicNTKScalingConfig, theta: float, dim: int, max_length: int):
        self.theta, self.dim, self.factor, self.magnitude = theta, dim, config.factor, 1.0
        self.original = config.original_length or max_length

    def frequencies(self, context: AttentionContext) -> Tensor:
        """-> frequencies_BSJ (S may be 1)"""
        length_BS1 = document_lengths(context).clamp(min=self.original).double()
        stretch_BS1 = self.factor * length_BS1 / self.original - (self.factor - 1)
        theta_BS1 = self.theta * stretch_BS1 ** (self.dim / (self.dim - 2))
        exponent_J = torch.arange(0, self.dim, 2, device=theta_BS1.device, dtype=torch.float64) / self.dim
        return theta_BS1**-exponent_J


class Llama3ScalingConfig(RopeScalingConfig):
    """Long wavelengths divided by a factor, short ones kept, those between blended (Llama 3.1, arXiv:2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat = Field(8.0, description="by how much long wavelengths grow")
    low_freq_factor: PositiveFloat = Field(1.0, description="wavelengths above original_length / this are divided")
    high_freq_factor: PositiveFloat = Field(4.0, description="wavelengths below original_length / this are kept")
    original_length: PositiveInt = Field(8192, description="context length of the original training")

    @model_validator(mode="after")
    def _low_is_below_high(self) -> "Llama3ScalingConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            message = f"{self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}"
            raise key_error("low_freq_factor", message)
        return self


class Llama3Scaling:
    def __init__(self, config: Llama3ScalingConfig, theta: float, dim: int, max_length: int):
        self.theta, self.dim, self.config, self.magnitude = theta, dim, config, 1.0

    def frequencies(self, context: AttentionContext) -> Tensor:
        """-> frequencies_J"""
        low, high = self.config.low_freq_factor, self.config.high_freq_factor
        plain_J = rope_frequencies(self.theta, self.dim, context.positions_BS.device)
        turns_J = self.config.original_length * plain_J / (2 * math.pi)
        kept_J = ((turns_J - low) / (high - low)).clamp(0, 1)
        return plain_J * (kept_J + (1 - kept_J) / self.config.factor)


class YarnScalingConfig(RopeScalingConfig):
    """Frequencies divided where the original context held few turns of them, and magnified (arXiv:2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat | None = Field(None, description="how much longer; null: max_length / original_length")
    original_length: PositiveInt = Field(description="context length of the original training")
    beta_fast: PositiveFloat = Field(32.0, description="frequencies of more turns than this are kept")
    beta_slow: PositiveFloat = Field(1.0, description="frequencies of fewer turns than this are divided")
    truncate: bool = Field(True, description="round the bounds of the blend to whole channels")
    attention_factor: PositiveFloat | None = Field(None, description="magnitude of cos and sin; null: from the factor")
    mscale: float | None = Field(None, description="with mscale_all_dim: numerator of the magnitude (DeepSeek)")
    mscale_all_dim: float | None = Field(None, description="with mscale: denominator of the magnitude (DeepSeek)")


class YarnScaling:
    def __init__(self, config: YarnScalingConfig, theta: float, dim: int, max_length: int):
        self.theta, self.dim, self.config = theta, dim, config
        self.factor = config.factor or max_length / config.original_length
        if config.attention_factor is not None:
            self.magnitude = config.attention_factor
        elif config.mscale and config.mscale_all_dim:
            self.magnitude = self._mscale(config.mscale) / self._mscale(config.mscale_all_dim)
        else:
            self.magnitude = self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def _channel(self, turns: float) -> float:
        """The (fractional) frequency that makes so many turns within the original length."""
        return self.dim * math.log(self.config.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def frequencies(self, context: AttentionContext) -> Tensor:
        """-> frequencies_J"""
        low, high = self._channel(self.config.beta_fast), self._channel(self.config.beta_slow)
        if self.config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        plain_J = rope_frequencies(self.theta, self.dim, context.positions_BS.device)
        index_J = torch.arange(self.dim // 2, device=plain_J.device, dtype=torch.float64)
        divided_J = ((index_J - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return plain_J * (1 - divided_J + divided_J / self.factor)


class LongRopeScalingConfig(RopeScalingConfig):
    """A divisor per frequency, one set up to the original length and one beyond (Ding et al. 2024, arXiv:2402.13753).

    A document takes the long set as a whole once it is longer than the original length. In generation, keys cached
    before that stay as they were rotated.
    """

    kind: Literal["longrope"] = "longrope"
    short_factor: list[PositiveFloat] = Field(description="divisors of documents up to the original length")
    long_factor: list[PositiveFloat] = Field(description="divisors of longer documents")
    original_length: PositiveInt = Field(description="context length of the original training")
    factor: PositiveFloat | None = Field(None, description="how much longer; null: max_length / original_length")
    attention_factor: PositiveFloat | None = Field(None, description="magnitude of cos and sin; null: from the factor")

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        for key, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(factors) != dim // 2:
                yield key, f"has {len(factors)} numbers; {dim} rotated channels have {dim // 2} frequencies"


class LongRopeScaling:
    def __init__(self, config: LongRopeScalingConfig, theta: float, dim: int, max_length: int):
        self.theta, self.dim, self.config = theta, dim, config
        factor, original = config.factor or max_length / config.original_length, config.original_length
        inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        self.magnitude = config.attention_factor or inferred
        self._divisors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def frequencies(self, context: AttentionContext) -> Tensor:
        """-> frequencies_BSJ (S may be 1)"""
        plain_J = rope_frequencies(self.theta, self.dim, context.positions_BS.device)
        short_J, long_J = self._on(plain_J)
        return plain_J / torch.where(document_lengths(context) > self.config.original_length, long_J, short_J)

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The divisors on a device, copied there once: a copy in every forward would stop the host each time."""
        found = self._divisors.get(like.device)
        if found is None:
            short_J, long_J = like.new_tensor(self.config.short_factor), like.new_tensor(self.config.long_factor)
            found = short_J, long_J
            if type(short_J) is Tensor:  # a fake tensor of a dry run must not outlive it
                self._divisors[like.device] = found
        return found
