"""What a layer's attention is, as static facts; and the mask that follows from the facts and the context.

B batch, S query length, T key length, H heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.attention.context import AttentionContext


@dataclass(frozen=True)
class AttentionFacts:
    """The part of attention that belongs to the architecture. Facts combine freely; a mask tensor is never stored.

    scale: what the dot products are multiplied by; None is 1/sqrt(head dim).
    window: a query at position i sees the keys at positions i-window+1 ... i; None sees all earlier ones.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118); None leaves them.
    alibi: alibi * slope * (i - j) is taken from each score, after the softcap, with a slope per head; 1 is the paper's
        (arXiv:2108.12409), 0 none.
    sinks: one learned logit per head joins each softmax and carries no value (GPT-OSS, arXiv:2508.10925): its tensor is
        the last argument of `attend`. The softcap and ALiBi do not touch it.
    heads: (the first, of how many) where the query heads are a part of a layer's heads, the others being with other
        ranks; None: they are all of them. ALiBi asks, whose slopes are not alike.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    alibi: float = 0.0
    sinks: bool = False
    heads: tuple[int, int] | None = None

    def keys_seen(self, length: float) -> float:
        """How many keys a query sees on average, causal, in a document of `length` tokens (for FLOPs: half of all)."""
        if self.window is None or self.window >= length:
            return length / 2
        return self.window - self.window**2 / (2 * length)  # the first tokens see less than a window


def visible(facts: AttentionFacts, context: AttentionContext, keys: int) -> Tensor:
    """Which key each query may see.  -> bool_BST

    The keys are the queries' own tokens, or what `context.keys` says; with a cache the key at index j has position j.
    """
    q_position_BS1, k_position_B1T = _positions(context, keys)
    q_documents_BS, k_documents_BT = context.documents_BS, context.documents_BS
    if context.keys is not None:
        k_documents_BT = context.keys.documents_BT
    mask_BST = k_position_B1T <= q_position_BS1
    if facts.window is not None:
        mask_BST &= k_position_B1T > q_position_BS1 - facts.window
    if q_documents_BS is not None and k_documents_BT is not None:
        mask_BST = mask_BST & (q_documents_BS[:, :, None] == k_documents_BT[:, None, :])
    return mask_BST


def alibi_slopes(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """How fast attention fades with distance, per head (Press et al. 2021, arXiv:2108.12409).  -> slopes_H

    For n heads, a power of two, head h of 1 ... n has 2^(-8h/n). Any other number takes those of the next lower power
    n, then every second one of 2n, from the first, as the authors' code, BLOOM and MPT do.
    """
    n = 2 ** math.floor(math.log2(heads))
    head_H = torch.arange(heads, device=device, dtype=torch.float64)
    return torch.exp2(-torch.where(head_H < n, 8 * (head_H + 1) / n, 4 * (2 * (head_H - n) + 1) / n)).to(dtype)


def slopes(facts: AttentionFacts, heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """What ALiBi takes from a score per token of distance, for the `heads` query heads that are here.  -> slopes_H"""
    first, total = facts.heads or (0, heads)
    return facts.alibi * alibi_slopes(total, device, dtype)[first : first + heads]


def alibi_bias(facts: AttentionFacts, heads: int, context: AttentionContext, keys: int, dtype: torch.dtype) -> Tensor:
    """What ALiBi adds to the scores: -alibi * slope * (i - j).  -> bias_BHST"""
    q_position_BS1, k_position_B1T = _positions(context, keys)
    distance_BST = q_position_BS1 - k_position_B1T
    slopes_H = slopes(facts, heads, distance_BST.device, dtype)
    return -slopes_H[:, None, None] * distance_BST[:, None]


def _positions(context: AttentionContext, keys: int) -> tuple[Tensor, Tensor]:
    """Of queries and keys, shaped so that they meet (B may be 1).  -> q_position_BS1, k_position_B1T

    Only differences count, and within a document those of places in the row are those of positions.
    """
    if context.keys is not None:
        return context.keys.query_places_S[None, :, None], context.keys.places_T[None, None, :]
    q_position_BS1 = context.positions_BS[:, :, None]
    if context.cache is None:
        return q_position_BS1, context.positions_BS[:, None, :]
    return q_position_BS1, torch.arange(keys, device=q_position_BS1.device)[None, None, :]
