"""Flash attention over packed documents through PyTorch's `varlen_attn` (CUDA, bf16 or fp16).

The B*S tokens lie end to end; cumulative lengths mark the documents. The kernel knows one head dim: values of another
size than queries and keys are computed with zeros between (DeepSeek's 192 and 128: a fifth more work than needed).

B batch, S sequence, T = B*S, H heads, G key-value heads, K head dim, V value dim, P the larger of the two.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts
from treadle.attention.padding import one_dim

# torch 2.13 asks for enable_gqa, 2.11 takes fewer key-value heads as they are.
_HAS_ENABLE_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def unsupported(
    q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int | None = None
) -> str | None:
    if q_BSHK.device.type != "cuda":
        return f"it runs on CUDA only, the tensors are on {q_BSHK.device.type}"
    if q_BSHK.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {q_BSHK.dtype}"
    if facts.softcap is not None:
        return "it has no softcap"
    if facts.alibi:
        return "it has no ALiBi"
    if facts.sinks:
        return "it has no sinks"
    if (reason := unreadable(context)) is not None:
        return reason
    if (largest := max(q_BSHK.shape[-1], value_dim or 0)) > 256:
        return f"its head dim is at most 256, not {largest}"
    return None


def unreadable(context: AttentionContext) -> str | None:
    """What kernels of whole documents laid end to end cannot read in a context; None if they can."""
    if context.cache is not None:
        return "it reads no cache"
    if context.keys is not None:
        return "its keys are those of the queries' own tokens"
    if context.documents_BS is not None and context.cumulative_lengths_N is None:
        return "it needs cumulative_lengths; make the context with AttentionContext.packed"
    return None


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None = None,
) -> Tensor:
    B, S, _, K = q_BSHK.shape
    q_BSHP, k_BSGP, v_BSGP = one_dim(q_BSHK, k_BSGK, v_BSGV)
    boundaries = context.cumulative_lengths_N
    if boundaries is None:
        boundaries = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=q_BSHK.device)
    longest = context.max_length or S
    grouped: dict[str, Any] = {"enable_gqa": True} if _HAS_ENABLE_GQA and q_BSHK.shape[2] != k_BSGK.shape[2] else {}
    out_THP: Any = varlen_attn(
        q_BSHP.flatten(0, 1),
        k_BSGP.flatten(0, 1),
        v_BSGP.flatten(0, 1),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=facts.scale or K**-0.5,
        window_size=(-1 if facts.window is None else facts.window - 1, 0),
        **grouped,
    )
    out_BSHP: Tensor = out_THP.view_as(q_BSHP)
    return out_BSHP[..., : v_BSGV.shape[-1]]
