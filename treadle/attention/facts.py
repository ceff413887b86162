"""What a layer's attention is, as static facts; and the mask that follows from the facts and the context.

B batch, S query length, T key length.
"""

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
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


def visible(facts: AttentionFacts, context: AttentionContext, keys: int) -> Tensor:
    """Which key each query may see.  -> bool_BST

    Without a cache the keys are the queries' own tokens. With a cache the key at index j has position j.
    """
    q_position_BS1 = context.positions_BS[:, :, None]
    if context.cache is None:
        k_position_B1T = context.positions_BS[:, None, :]
    else:
        k_position_B1T = torch.arange(keys, device=q_position_BS1.device)[None, None, :]
    mask_BST = k_position_B1T <= q_position_BS1
    if facts.window is not None:
        mask_BST &= k_position_B1T > q_position_BS1 - facts.window
    if context.documents_BS is not None:
        mask_BST &= context.documents_BS[:, :, None] == context.documents_BS[:, None, :]
    return mask_BST
