"""Causal attention of whole rows through our kernels in TileLang, on Hopper. Only where it is named.

B batch, S sequence, H heads, G key-value heads, K head dim.
"""

import functools
from typing import Any

import torch
from torch import Tensor, autograd

from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts
from treadle.kernels.causal_attention import CAUSAL_ATTENTION, CAUSAL_ATTENTION_BACKWARD, unfit
from treadle.kernels.operation import missing

FORWARD, BACKWARD = CAUSAL_ATTENTION.of("tilelang"), CAUSAL_ATTENTION_BACKWARD.of("tilelang")


def unsupported(
    q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int | None = None
) -> str | None:
    if context.backend != "tilelang":
        return "it is used only where it is named"
    if q_BSHK.device.type != "cuda":
        return f"it runs on CUDA only, the tensors are on {q_BSHK.device.type}"
    for name in ("window", "softcap", "alibi", "sinks"):
        if getattr(facts, name):
            return f"it has no {name}"
    if context.cache is not None or context.keys is not None:
        return "it reads no cache, and no keys of other tokens"
    if context.documents_BS is not None:
        return "its rows are one document each"
    if value_dim not in (None, q_BSHK.shape[-1]):
        return f"its values are of the head dim {q_BSHK.shape[-1]}, not {value_dim}"
    if q_BSHK.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {q_BSHK.dtype}"
    return unfit(q_BSHK.shape[1], q_BSHK.shape[3]) or _missing()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing() -> str | None:
    return _looked_up()


@functools.cache
def _looked_up() -> str | None:
    return missing("tilelang", "cuda")


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None = None,
) -> Tensor:
    return _Attention.apply(q_BSHK, k_BSGK, v_BSGK, facts.scale or q_BSHK.shape[-1] ** -0.5)  # type: ignore[no-any-return]


class _Attention(autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, log_sum = FORWARD(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *BACKWARD(grads[0], *ctx.saved_tensors, ctx.scale), None
