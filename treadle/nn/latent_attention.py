"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434; V3, arXiv:2412.19437).

Keys and values of all heads come from one small vector per token, the latent; a short key that all heads share carries
the position. Inference keeps these two alone.

B batch, S queries, T keys, D model dim, H heads, Q query rank, C latent (key-value rank), N channels of a head without
position, R with (rotary), V value dim, M = C + R numbers kept per token.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from treadle.attention import AttentionContext, AttentionFacts, TokenCache, attend, gathered
from treadle.nn.config import MixerConfig, NormConfig
from treadle.nn.linear import Linear
from treadle.nn.norm import RMSNormConfig
from treadle.nn.position import RopeConfig


class LatentAttentionConfig(MixerConfig):
    """Softmax attention whose keys and values are expanded from a latent per token (MLA)."""

    in_parts = True
    kind: Literal["latent_attention"] = "latent_attention"
    heads: PositiveInt = Field(description="heads of queries, keys and values")
    q_rank: PositiveInt | None = Field(None, description="size that queries are compressed to; null: they are not")
    kv_rank: PositiveInt = Field(description="size of the latent that keys and values are expanded from")
    nope_dim: PositiveInt = Field(description="channels of each query and key head that carry no position")
    rope_dim: PositiveInt = Field(description="channels that do; in keys all heads share them")
    value_dim: PositiveInt = Field(description="size of a value head")
    position: RopeConfig | None = Field(RopeConfig(), description="what rotates the rope_dim channels; null: nothing")
    norm: NormConfig = Field(RMSNormConfig(eps=1e-6), description="norm of the compressed queries and of the latent")
    window: PositiveInt | None = Field(None, description="sees this many tokens, itself included; null: all earlier")
    softcap: PositiveFloat | None = Field(None, description="scores become cap * tanh(scores / cap)")
    scale: PositiveFloat | None = Field(
        None, description="factor on the dot products; null: 1/sqrt(nope_dim + rope_dim), without YaRN's mscale"
    )
    bias: bool = Field(False, description="bias on the compressing projections and on the output")

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        if self.position is not None:
            for key, message in self.position.problems(self.rope_dim):
                if key == "head_dim":
                    yield "rope_dim", f"{self.rope_dim} {message}"
                else:
                    yield f"position.{key}", message


class LatentAttention(nn.Module):
    """out(attend([q | rotated q], [k | rotated shared key], v)), with k and v linear in the latent.  x_BSD -> y_BSD

    Two forms give the same. Expanded: k and v are computed for every head, as in multi-head attention. Absorbed: the
    matrices that expand the latent act on the few queries and outputs instead, and all heads attend to [latent | shared
    key] itself, so that a cached token is never expanded.

    Weights, with the Hugging Face tensors of DeepSeek that they are made of:
        down    [Q + C + R, D]      q_a_proj (if queries are compressed), then kv_a_proj_with_mqa (latent, shared key)
        q_up    [H * (N + R), Q]    q_b_proj as it is; q_proj (of D inputs) where queries are not compressed
        kv_up   [H * N + H * V, C]  kv_b_proj.view(H, N + V, C): [:, :N] for all heads, then [:, N:] for all heads
        out     [D, H * V]          o_proj as it is
    """

    roles = {"down": "replicate", "q_up": "column", "kv_up": "column", "out": "row"}
    exit = "out"
    head_counts: dict[str, tuple[str, ...]] = {"heads": ()}

    def __init__(self, config: LatentAttentionConfig, model_dim: int, max_length: int):
        super().__init__()
        self.heads, self.q_rank, self.kv_rank = config.heads, config.q_rank or 0, config.kv_rank
        self.nope_dim, self.rope_dim, self.value_dim = config.nope_dim, config.rope_dim, config.value_dim
        head_dim = self.nope_dim + self.rope_dim
        self.head_dims = (head_dim, self.value_dim)
        # The scale is explicit, as the absorbed form has heads of another size.
        self.facts = AttentionFacts(scale=config.scale or head_dim**-0.5, window=config.window, softcap=config.softcap)
        parts = {"q": self.q_rank} if self.q_rank else {}
        parts |= {"kv": self.kv_rank, "k_rope": self.rope_dim}
        self.down = Linear(model_dim, sum(parts.values()), bias=config.bias, parts=parts)
        self.q_norm = config.norm.build(self.q_rank) if self.q_rank else None
        self.q_up = Linear(self.q_rank or model_dim, self.heads * head_dim)
        self.kv_norm = config.norm.build(self.kv_rank)
        parts = {"k": self.heads * self.nope_dim, "v": self.heads * self.value_dim}
        self.kv_up = Linear(self.kv_rank, sum(parts.values()), parts=parts)
        self.position = config.position.build(self.rope_dim, max_length) if config.position else None
        self.out = Linear(self.heads * self.value_dim, model_dim, bias=config.bias)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        q_BSQ, latent_BSC, key_BSR = self.down(x_BSD).split((self.q_rank, self.kv_rank, self.rope_dim), dim=-1)
        q_BSHK = self.q_up(x_BSD if self.q_norm is None else self.q_norm(q_BSQ)).unflatten(-1, (self.heads, -1))
        q_BSHN, q_BSHR = q_BSHK.split((self.nope_dim, self.rope_dim), dim=-1)
        key_BS1R = key_BSR[:, :, None]
        if self.position is not None:
            q_BSHR, key_BS1R = self.position(q_BSHR, key_BS1R, context)
        latent_BTC, key_BTR = self.kv_norm(latent_BSC), key_BS1R[:, :, 0]
        if context.cache is not None:
            (kept_BTM,) = context.cache.append(torch.cat((latent_BTC, key_BTR), dim=-1))
            if context.cache.in_pages or self.absorbing_is_cheaper(x_BSD.shape[1], kept_BTM.shape[1]):
                return self.out(self.absorbed(q_BSHN, q_BSHR, kept_BTM, context).flatten(-2))
            latent_BTC, key_BTR = kept_BTM.split((self.kv_rank, self.rope_dim), dim=-1)
        latent_BTC, key_BTR = gathered(context, latent_BTC, key_BTR)  # smaller than keys and values
        return self.out(self.expanded(q_BSHN, q_BSHR, latent_BTC, key_BTR, context).flatten(-2))

    def expanded(
        self, q_BSHN: Tensor, q_BSHR: Tensor, latent_BTC: Tensor, key_BTR: Tensor, context: AttentionContext
    ) -> Tensor:
        """Attention with keys and values of every head.  -> out_BSHV"""
        k_BTX, v_BTX = self.kv_up(latent_BTC).split(self._expanded_sizes(), dim=-1)
        k_BTHN, v_BTHV = k_BTX.unflatten(-1, (self.heads, -1)), v_BTX.unflatten(-1, (self.heads, -1))
        key_BTHR = key_BTR[:, :, None].expand(-1, -1, self.heads, -1)
        q_BSHK, k_BTHK = torch.cat((q_BSHN, q_BSHR), dim=-1), torch.cat((k_BTHN, key_BTHR), dim=-1)
        return attend(q_BSHK, k_BTHK, v_BTHV, self.facts, context)

    def absorbed(self, q_BSHN: Tensor, q_BSHR: Tensor, kept_BTM: Tensor, context: AttentionContext) -> Tensor:
        """Attention to what is kept of the tokens, [latent | shared key], as the one key head.  -> out_BSHV"""
        weights = self.kv_up.weight.to(q_BSHN.dtype).split(self._expanded_sizes())
        k_up_HNC, v_up_HVC = (weight.unflatten(0, (self.heads, -1)) for weight in weights)
        q_BSHM = torch.cat((torch.einsum("bshn,hnc->bshc", q_BSHN, k_up_HNC), q_BSHR), dim=-1)
        kept_BT1M = kept_BTM[:, :, None]
        out_BSHC = attend(q_BSHM, kept_BT1M, kept_BT1M[..., : self.kv_rank], self.facts, context)
        return torch.einsum("bshc,hvc->bshv", out_BSHC, v_up_HVC)

    def _expanded_sizes(self) -> list[int]:
        """Of all heads' keys and of their values, as `kv_up` makes them."""
        return [self.heads * self.nope_dim, self.heads * self.value_dim]

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form takes fewer FLOPs, `keys` counting the queries' own.

        It saves expanding the earlier tokens, and pays with larger heads for every pair. True for a new token or a few
        after many; False for the first call, and for long pieces (DeepSeek's sizes: beyond about 170 tokens).
        """
        ends = self.nope_dim + self.value_dim
        return queries * keys * (2 * self.kv_rank - ends) < (keys - queries) * self.kv_rank * ends

    def mixing_flops(self, length: float) -> float:
        """Forward FLOPs per token of scores and weighted sum in the expanded form, causal, at `length` tokens."""
        per_key = 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim)
        return per_key * self.facts.keys_seen(length)

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TokenCache:
        """Room for latents and shared keys, side by side so that the absorbed form reads them as they lie."""
        return TokenCache(batch, capacity, [(self.cache_elements(),)], dtype, device)

    def cache_elements(self) -> int:
        """Numbers kept per token in inference."""
        return self.kv_rank + self.rope_dim
