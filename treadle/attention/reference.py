"""Attention by its definition, in float32 or wider: any facts, any device, quadratic memory. The oracle of the others.

B batch, S query length, T key length, G key-value heads, R query heads per key-value head, K head dim, V value dim.
"""

import torch
from torch import Tensor

from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts, alibi_bias, visible


def unsupported(
    q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int | None = None
) -> str | None:
    return None


def attend(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None = None,
) -> Tensor:
    B, S, H, K = q_BSHK.shape
    G = k_BTGK.shape[2]
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    q_BSGRK = q_BSHK.to(wide).view(B, S, G, H // G, K)
    scores_BGRST = torch.einsum("bsgrk,btgk->bgrst", q_BSGRK, k_BTGK.to(wide)) * (facts.scale or K**-0.5)
    if facts.softcap is not None:
        scores_BGRST = facts.softcap * torch.tanh(scores_BGRST / facts.softcap)
    if facts.alibi:
        scores_BGRST = scores_BGRST + alibi_bias(facts, H, context, k_BTGK.shape[1], wide).unflatten(1, (G, H // G))
    mask_BST = visible(facts, context, k_BTGK.shape[1])
    scores_BGRST = scores_BGRST.masked_fill(~mask_BST[:, None, None], float("-inf"))
    if sinks_H is not None:
        sinks_BGRS1 = sinks_H.to(wide).view(1, G, H // G, 1, 1).expand(B, -1, -1, S, 1)
        weights_BGRST = torch.cat((scores_BGRST, sinks_BGRS1), dim=-1).softmax(-1)[..., :-1]
    else:
        weights_BGRST = scores_BGRST.softmax(-1)
    out_BSGRV = torch.einsum("bgrst,btgv->bsgrv", weights_BGRST, v_BTGV.to(wide))
    return out_BSGRV.reshape(B, S, H, -1).to(q_BSHK.dtype)
