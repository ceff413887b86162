"""Attention through `scaled_dot_product_attention`: cuDNN or flash for plain causal rows, a dense mask for the rest.

ALiBi is a dense mask of numbers in float32 (bf16 would blur far distances), which PyTorch's plain formula takes and its
fused kernels do not. A sink is one more key and value of zeros, whose mask is the sink's logit.

Values of another size than queries and keys: flash and cuDNN want one head dim, so that plain causal rows are filled up
with zeros as far as those kernels reach (256); with a mask, PyTorch's memory-efficient kernel (CUDA) or its plain
formula takes them as they are.

B batch, S query length, T key length, H heads, G key-value heads, R query heads of each, K head dim, V value dim.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts, alibi_bias, visible
from treadle.attention.padding import one_dim


def unsupported(
    q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int | None = None
) -> str | None:
    return "it has no softcap" if facts.softcap is not None else None


def attend(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None = None,
) -> Tensor:
    fresh = context.cache is not None and context.cache.fresh(q_BSHK.shape[1])
    causal = is_plain(q_BSHK.shape[1], facts, replace(context, cache=None) if fresh else context)
    mask = None if causal else _mask(q_BSHK, k_BTGK.shape[1], facts, context, sinks_H)
    if sinks_H is not None:
        k_BTGK, v_BTGV = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k_BTGK, v_BTGV))
    scale, S, G, V = facts.scale or q_BSHK.shape[-1] ** -0.5, q_BSHK.shape[1], k_BTGK.shape[2], v_BTGV.shape[-1]
    if causal and max(q_BSHK.shape[-1], V) <= 256:
        q_BSHK, k_BTGK, v_BTGV = one_dim(q_BSHK, k_BTGK, v_BTGV)
    q_BHSK = q_BSHK.transpose(1, 2)
    if mask is not None and context.cache is not None and q_BHSK.shape[1] != G:
        q_BHSK, mask = _as_rows(q_BHSK, mask, G)
    with _kernels(q_BSHK, mask):
        out_BHSV = F.scaled_dot_product_attention(
            q_BHSK,
            k_BTGK.transpose(1, 2),
            v_BTGV.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=q_BHSK.shape[1] != G,
        )
    if out_BHSV.shape[2] != S:
        out_BHSV = out_BHSV.unflatten(2, (-1, S)).flatten(1, 2)
    return out_BHSV[..., :V].transpose(1, 2)


def _as_rows(q_BHSK: Tensor, mask: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The query heads of a group as further queries of one head: R * S of them, head by head.

    In generation queries are few and keys many: where a kernel knows no groups, the keys would be repeated per head.
    """
    R = q_BHSK.shape[1] // groups
    mask_BGRST = mask[:, :, None].expand(-1, -1, R, -1, -1) if mask.shape[1] == 1 else mask.unflatten(1, (groups, R))
    return q_BHSK.unflatten(1, (groups, R)).flatten(2, 3), mask_BGRST.flatten(2, 3)


def _mask(
    q_BSHK: Tensor, keys: int, facts: AttentionFacts, context: AttentionContext, sinks_H: Tensor | None
) -> Tensor:
    """Which keys are seen, as booleans; with ALiBi or sinks what is added to the scores.  -> mask_B1ST or mask_BHST"""
    B, S, H, _ = q_BSHK.shape
    seen_B1ST = visible(facts, context, keys)[:, None]
    if not (facts.alibi or facts.sinks):
        return seen_B1ST
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    if facts.alibi:
        bias = alibi_bias(facts, H, context, keys, wide)
    else:
        bias = torch.zeros((), dtype=wide, device=q_BSHK.device)
    mask = torch.where(seen_B1ST, bias, float("-inf"))
    if sinks_H is not None:
        sink_BHS1 = sinks_H.to(wide).view(1, H, 1, 1).expand(B, H, S, 1)
        mask = torch.cat((mask.expand(B, H, S, keys), sink_BHS1), dim=-1)
    return mask


def is_plain(length: int, facts: AttentionFacts, context: AttentionContext) -> bool:
    """True when every row is one document seen whole: no mask is needed beyond the triangle."""
    if facts.alibi or facts.sinks:
        return False
    whole = facts.window is None or facts.window >= length
    return whole and context.documents_BS is None and context.cache is None and context.keys is None


def _kernels(q_BSHK: Tensor, mask: Tensor | None) -> AbstractContextManager[None]:
    """On a GPU ask for cuDNN before flash: PyTorch's own order takes flash, 1.6 times slower on Hopper."""
    if q_BSHK.device.type != "cuda":
        return nullcontext()
    if mask is not None and mask.is_floating_point():
        return sdpa_kernel(SDPBackend.MATH)
    return sdpa_kernel(_ORDER, set_priority=True)


_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
