"""Multi-head attention with any number of key-value heads: MHA, GQA (arXiv:2305.13245), MQA (arXiv:1911.02150).

B batch, S sequence, D model dim, H heads, G key-value heads, K head dim.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from treadle.attention import AttentionContext, AttentionFacts, TokenCache, attend
from treadle.config.base import key_error
from treadle.nn.config import MixerConfig, NormConfig, PositionConfig
from treadle.nn.linear import Linear
from treadle.nn.norm import RMSNorm
from treadle.nn.position import AlibiConfig, Rope, RopeConfig


class AttentionConfig(MixerConfig):
    """Softmax attention. `kv_heads` = heads is MHA, fewer is GQA, 1 is MQA."""

    in_parts = True
    kind: Literal["attention"] = "attention"
    heads: PositiveInt = Field(description="query heads")
    kv_heads: PositiveInt | None = Field(None, description="key-value heads; null: as many as heads")
    head_dim: PositiveInt | None = Field(None, description="size of a head; null: model dim / heads")
    position: PositionConfig | None = Field(RopeConfig(), description="how positions enter; null: not at all (NoPE)")
    window: PositiveInt | None = Field(None, description="sees this many tokens, itself included; null: all earlier")
    qk_norm: NormConfig | None = Field(None, description="norm of queries and keys (arXiv:2302.05442)")
    qk_norm_over: Literal["head", "all", "own"] = Field(
        "head", description="each head, with one weight for all; all heads as one vector (OLMo 2); each, with its own"
    )
    clip: PositiveFloat | None = Field(None, description="queries, keys and values are clamped to +-this (OLMo, MPT)")
    softcap: PositiveFloat | None = Field(None, description="scores become cap * tanh(scores / cap)")
    sinks: bool = Field(False, description="learn a logit per head that joins each softmax and carries no value")
    scale: PositiveFloat | None = Field(None, description="factor on the dot products; null: 1/sqrt(head dim)")
    bias: bool = Field(False, description="bias on the query, key and value projections")
    output_bias: bool = Field(False, description="bias on the output projection")

    @model_validator(mode="after")
    def _heads_divide(self) -> "AttentionConfig":
        if self.kv_heads is not None and self.heads % self.kv_heads:
            fits = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise key_error("kv_heads", f"{self.kv_heads} does not divide heads={self.heads}; try {fits}")
        return self

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        if self.head_dim is None and dim % self.heads:
            yield "heads", f"{self.heads} does not divide the model's dim={dim}; choose a divisor or set head_dim"
        elif self.position is not None:
            for key, message in self.position.problems(self.head_dim or dim // self.heads):
                if key != "head_dim":
                    yield f"position.{key}", message
                elif self.head_dim is not None:
                    yield "head_dim", f"{self.head_dim} {message}"
                else:
                    yield "heads", f"dim={dim} / heads={self.heads} {message}"


class Attention(nn.Module):
    """out(attend(position(norm(q)), position(norm(k)), v)), with q, k, v stored as one matrix.  x_BSD -> y_BSD"""

    roles = {"qkv": "column", "out": "row", "q_norm": "replicate", "k_norm": "replicate", "sinks": "column"}
    entry, exit = "qkv", "out"
    head_counts = {"heads": (), "kv_heads": ("k", "v")}

    def __init__(self, config: AttentionConfig, model_dim: int, max_length: int):
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim = config.head_dim or model_dim // config.heads
        self.head_dims = (self.head_dim, self.head_dim)
        self.facts = AttentionFacts(
            scale=config.scale,
            window=config.window,
            softcap=config.softcap,
            alibi=config.position.scale if isinstance(config.position, AlibiConfig) else 0.0,
            sinks=config.sinks,
        )
        parts = {
            "q": self.heads * self.head_dim,
            "k": self.kv_heads * self.head_dim,
            "v": self.kv_heads * self.head_dim,
        }
        self.qkv = Linear(model_dim, sum(parts.values()), bias=config.bias, parts=parts)
        self.q_norm, self.k_norm, self.norm_all, self.clip = None, None, config.qk_norm_over == "all", config.clip
        over = config.qk_norm_over
        self.norms_of_heads = {} if over == "head" else {"q_norm": ("heads", over), "k_norm": ("kv_heads", over)}
        if config.qk_norm is not None:
            self.q_norm, self.k_norm = (
                config.qk_norm.build(heads * self.head_dim)
                if self.norm_all
                else config.qk_norm.build(self.head_dim, heads if config.qk_norm_over == "own" else None)
                for heads in (self.heads, self.kv_heads)
            )
        self.position = config.position.build(self.head_dim, max_length) if config.position else None
        self.norm_then_turn = config.qk_norm_over == "head" and isinstance(self.position, Rope)
        self.sinks = nn.Parameter(torch.empty(self.heads)) if config.sinks else None
        self.out = Linear(self.heads * self.head_dim, model_dim, bias=config.output_bias)

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        qkv_BSNK = self.qkv(x_BSD).unflatten(-1, (-1, self.head_dim))
        if self.clip is not None:
            qkv_BSNK = qkv_BSNK.clamp(-self.clip, self.clip)
        q_BSHK, k_BSGK, v_BSGK = qkv_BSNK.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        norms = self.norms_with_position
        if norms is None and self.q_norm is not None and self.k_norm is not None:
            if self.norm_all:
                q_BSHK, k_BSGK = q_BSHK.flatten(-2), k_BSGK.flatten(-2)
            q_BSHK, k_BSGK = self.q_norm(q_BSHK), self.k_norm(k_BSGK)
            if self.norm_all:
                q_BSHK, k_BSGK = (x.unflatten(-1, (-1, self.head_dim)) for x in (q_BSHK, k_BSGK))
        if self.position is not None:
            extra = () if norms is None else (norms,)
            q_BSHK, k_BSGK = self.position(q_BSHK, k_BSGK, context, *extra)
            if context.cache is None:
                v_BSGK = v_BSGK.contiguous()  # as a part of qkv it would keep all of that for the backward
        k_BTGK, v_BTGK = k_BSGK, v_BSGK
        if context.cache is not None:
            k_BTGK, v_BTGK = context.cache.append(k_BSGK, v_BSGK)
        return self.out(attend(q_BSHK, k_BTGK, v_BTGK, self.facts, context, self.sinks).flatten(-2))

    @property
    def norms_with_position(self) -> tuple[RMSNorm, RMSNorm] | None:
        """Norms of queries and keys that are taken in one pass with the rotation that follows."""
        q_norm, k_norm = self.q_norm, self.k_norm
        fused = self.norm_then_turn and isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm)
        return (q_norm, k_norm) if fused else None  # type: ignore[return-value]

    def mixing_flops(self, length: float) -> float:
        """Forward FLOPs per token of scores and weighted sum, causal, at sequences of `length` tokens."""
        return 4 * self.heads * self.head_dim * self.facts.keys_seen(length)

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TokenCache:
        """Room for the keys and values of `batch` rows of up to `capacity` tokens."""
        return TokenCache(batch, capacity, [(self.kv_heads, self.head_dim)] * 2, dtype, device)

    def cache_elements(self) -> int:
        """Numbers kept per token in inference."""
        return 2 * self.kv_heads * self.head_dim
