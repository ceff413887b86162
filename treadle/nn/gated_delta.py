"""Gated delta net: a mixer whose memory is a matrix per head (Yang et al. 2024, arXiv:2412.06464; Qwen3-Next).

B batch, S sequence, D model dim, H query and key heads, G value heads, K key dim, V value dim, W convolution's width,
E = 2F + U channels of queries, keys and values: F = HK, U = GV.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from treadle.attention import AttentionContext, over_rows
from treadle.config.base import key_error
from treadle.kernels.gated_delta_rule import gated_delta_rule
from treadle.nn.config import MixerConfig, NormConfig
from treadle.nn.linear import Linear
from treadle.nn.norm import RMSNormConfig
from treadle.nn.short_convolution import ShortConvolution

# Where the paper's and Mamba-2's decays start: exp(-A * dt), with A even in (0, A_MAX) and log(dt) even in between.
A_MAX = 16.0
DT_MIN, DT_MAX = 1e-3, 1e-1


class GatedDeltaConfig(MixerConfig):
    """Gated delta net. Time grows linearly with the length; what is kept in inference does not grow."""

    kind: Literal["gated_delta"] = "gated_delta"
    heads: PositiveInt = Field(description="query and key heads")
    value_heads: PositiveInt | None = Field(
        None, description="value heads, a multiple of heads; null: as many as heads"
    )
    head_dim: PositiveInt | None = Field(None, description="size of a query and key head; null: model dim / heads")
    value_dim: PositiveInt | None = Field(None, description="size of a value head; null: as head_dim")
    conv: PositiveInt = Field(4, description="tokens that the convolution of queries, keys and values sees; 1: its own")
    norm: NormConfig = Field(RMSNormConfig(), description="norm of what each value head reads, before its gate")

    @model_validator(mode="after")
    def _heads_divide(self) -> "GatedDeltaConfig":
        if self.value_heads is not None and self.value_heads % self.heads:
            below = max(self.value_heads // self.heads, 1) * self.heads
            raise key_error(
                "value_heads",
                f"{self.value_heads} is no multiple of heads={self.heads}; try {below} or {below + self.heads}",
            )
        return self

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        if self.head_dim is None and dim % self.heads:
            yield "heads", f"{self.heads} does not divide the model's dim={dim}; choose a divisor or set head_dim"


class GatedDeltaState:
    """What a layer keeps of all tokens so far: of one size, however many they were."""

    def __init__(self, past_BWE: Tensor, state_BGKV: Tensor):
        """past_BWE: the convolution's last W - 1 inputs. state_BGKV: float32 or wider."""
        self.past_BWE, self.state_BGKV = past_BWE, state_BGKV

    def replace(self, past_BWE: Tensor, state_BGKV: Tensor) -> None:
        # In place: a captured graph goes on reading the same memory.
        self.past_BWE.copy_(past_BWE)
        self.state_BGKV.copy_(state_BGKV)


class GatedDelta(nn.Module):
    """out(norm(delta_rule(q, k, v, decay, beta)) * silu(z)).  x_BSD -> y_BSD

    q, k and v pass a short convolution and SiLU, q and k are brought to length one. The token at position 0 begins a
    document: it sees no state and no neighbours of the tokens before it.
    """

    roles = {
        "qkvz": "column",
        "ba": "column",
        "A_log": "column",
        "dt_bias": "column",
        "norm": "replicate",
        "out": "row",
    }
    exit = "out"
    head_counts = {"heads": ("q", "k"), "value_heads": ()}
    full_precision = True  # decay, step size and convolution

    def __init__(self, config: GatedDeltaConfig, model_dim: int, max_length: int):
        super().__init__()
        self.heads, self.value_heads = config.heads, config.value_heads or config.heads
        self.head_dim = config.head_dim or model_dim // config.heads
        self.value_dim = config.value_dim or self.head_dim
        q, k, v = self._sizes()
        self.qkvz = Linear(model_dim, q + k + v + v, parts={"q": q, "k": k, "v": v, "z": v})
        self.ba = Linear(model_dim, 2 * self.value_heads, parts=("b", "a"))
        self.conv = ShortConvolution(self.channels, config.conv, parts={"q": q, "k": k, "v": v})
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.norm = config.norm.build(self.value_dim)
        self.out = Linear(v, model_dim)

    def _sizes(self) -> list[int]:
        """Channels of queries, keys and values."""
        keys = self.heads * self.head_dim
        return [keys, keys, self.value_heads * self.value_dim]

    @property
    def channels(self) -> int:
        return sum(self._sizes())

    def initial(self, name: str, uniform: Tensor) -> Tensor:
        if name == "A_log":
            return (A_MAX * uniform).log()
        dt = (math.log(DT_MIN) + math.log(DT_MAX / DT_MIN) * uniform).exp()
        return dt + (-torch.expm1(-dt)).log()  # softplus of it is dt

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        return over_rows(self._sequences, x_BSD, context)

    def _sequences(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        positions_BS, cache = context.positions_BS, context.cache
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        qkv_BSE, z_BSU = self.qkvz(x_BSD).split((self.channels, self._sizes()[-1]), dim=-1)
        mixed_BSE = F.silu(self.conv(qkv_BSE.to(wide), positions_BS, cache.past_BWE if cache is not None else None))
        q_BSF, k_BSF, v_BSU = mixed_BSE.split(self._sizes(), dim=-1)
        q_BSHK, k_BSHK = (_unit(x.unflatten(-1, (-1, self.head_dim))) for x in (q_BSF, k_BSF))
        log_decay_BSG, beta_BSG = self._gates(x_BSD, wide)
        y_BSGV, state_BGKV = gated_delta_rule(
            q_BSHK * self.head_dim**-0.5,
            k_BSHK,
            v_BSU.unflatten(-1, (-1, self.value_dim)),
            log_decay_BSG,
            beta_BSG,
            positions_BS == 0,
            cache.state_BGKV if cache is not None else None,
        )
        if cache is not None:
            past_BTE = torch.cat((cache.past_BWE, qkv_BSE), dim=1)
            cache.replace(past_BTE[:, qkv_BSE.shape[1] :], state_BGKV)
        gate_BSGV = F.silu(z_BSU.to(wide)).unflatten(-1, (-1, self.value_dim))
        return self.out((self.norm(y_BSGV.to(x_BSD.dtype)) * gate_BSGV).flatten(-2).to(x_BSD.dtype))

    def _gates(self, x_BSD: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """How much of the state stays, as a logarithm, and how strongly a token writes.  -> log_decay_BSG, beta_BSG"""
        b_BSG, a_BSG = self.ba(x_BSD).to(wide).chunk(2, dim=-1)
        return -self.A_log.to(wide).exp() * F.softplus(a_BSG + self.dt_bias.to(wide)), b_BSG.sigmoid()

    def mixing_flops(self, length: float) -> float:
        """Forward FLOPs per token, at any length: 6KV for each value head, and 2WE for the convolution.

        A head's state is multiplied with the key, changed by an outer product and multiplied with the query, KV
        multiplications and additions each. The chunked form does more: what it needs is counted, as for attention.
        """
        state = 6 * self.value_heads * self.head_dim * self.value_dim
        return float(state + 2 * self.conv.width * self.channels)

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> GatedDeltaState:
        """The state of `batch` rows that have seen no token; it serves any capacity."""
        wide = torch.promote_types(dtype, torch.float32)
        state = (batch, self.value_heads, self.head_dim, self.value_dim)
        return GatedDeltaState(
            torch.zeros(batch, self.conv.width - 1, self.channels, dtype=dtype, device=device),
            torch.zeros(state, dtype=wide, device=device),
        )

    def cache_elements(self) -> int:
        """Numbers kept per token in inference: none."""
        return 0

    def state_elements(self) -> int:
        """Numbers kept per row in inference, however long it is."""
        return self.value_heads * self.head_dim * self.value_dim + (self.conv.width - 1) * self.channels


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; the epsilon is that of the published models."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
