"""Attention through `scaled_dot_product_attention`: cuDNN or flash for plain causal rows, a dense mask for the rest.

B batch, S query length, T key length, H heads, G key-value heads, K head dim.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts, visible


def unsupported(q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext) -> str | None:
    return "it has no softcap" if facts.softcap is not None else None


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, facts: AttentionFacts, context: AttentionContext) -> Tensor:
    first_call = replace(context, cache=None) if q_BSHK.shape[1] == k_BTGK.shape[1] else context  # the cache was empty
    causal = is_plain_causal(q_BSHK, facts, first_call)
    with _kernels(q_BSHK):
        out_BHSK = F.scaled_dot_product_attention(
            q_BSHK.transpose(1, 2),
            k_BTGK.transpose(1, 2),
            v_BTGK.transpose(1, 2),
            attn_mask=None if causal else visible(facts, context, k_BTGK.shape[1])[:, None],
            is_causal=causal,
            scale=facts.scale,
            enable_gqa=q_BSHK.shape[2] != k_BTGK.shape[2],
        )
    return out_BHSK.transpose(1, 2)


def is_plain_causal(q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext) -> bool:
    """True when every row is one document seen whole: no mask is needed beyond the triangle."""
    whole = facts.window is None or facts.window >= q_BSHK.shape[1]
    return whole and context.documents_BS is None and context.cache is None


def _kernels(q_BSHK: Tensor) -> AbstractContextManager[None]:
    """On a GPU ask for cuDNN before flash: PyTorch's own order takes flash, 1.6 times slower on Hopper."""
    return sdpa_kernel(_ORDER, set_priority=True) if q_BSHK.device.type == "cuda" else nullcontext()


_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
