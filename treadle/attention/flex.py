"""Attention through `flex_attention` (CUDA): every fact that the reference knows, at near-flash speed.

B batch, S sequence, H heads, G key-value heads, K head dim, V value dim, T keys, C number of 128-token chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts, head_slopes

CHUNK = 128


def unsupported(
    q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int | None = None
) -> str | None:
    if q_BSHK.device.type != "cuda":
        return f"it trains on CUDA only, the tensors are on {q_BSHK.device.type}"
    if context.cache is not None:
        return "it reads no cache"
    return None


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None = None,
) -> Tensor:
    kernel: Any = flex_attention if torch.compiler.is_compiling() or q_BSHK.device.type == "cpu" else _compiled()
    options: dict[str, Any] = {} if sinks_H is None else {"return_aux": AuxRequest(lse=True)}
    result = kernel(
        q_BSHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGV.transpose(1, 2),
        score_mod=_score_mod(facts, q_BSHK, context),
        block_mask=block_mask(facts, context),
        scale=facts.scale,
        enable_gqa=q_BSHK.shape[2] != k_BSGK.shape[2],
        **options,
    )
    if sinks_H is None:
        out_BHSK: Tensor = result
        return out_BHSK.transpose(1, 2)
    # A sink takes its share of the softmax from all keys alike: exp(lse) / (exp(lse) + exp(sink)) is left to them.
    share_BHS1 = torch.sigmoid(result[1].lse - sinks_H[:, None])[..., None]
    return (result[0] * share_BHS1).to(q_BSHK.dtype).transpose(1, 2)


def _score_mod(facts: AttentionFacts, q_BSHK: Tensor, context: AttentionContext) -> Callable[..., Tensor] | None:
    """What happens to a scaled score before the softmax, as flex wants it."""
    if facts.softcap is None and not facts.alibi:
        return None
    softcap, cut = facts.softcap, context.keys is not None
    q_place_S, k_place_T = _places(context)
    slopes_H = head_slopes(facts, q_BSHK.shape[2], q_BSHK.device) if facts.alibi else None

    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes_H is not None:  # within a document, a distance of indices is one of positions
            distance = q_place_S[q] - k_place_T[k] if cut else q - k
            score = score - slopes_H[h] * distance
        return score

    return change


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def block_mask(facts: AttentionFacts, context: AttentionContext) -> BlockMask:
    """The mask as flex wants it: which 128 x 128 chunks to visit, and a function for the elements inside.

    Which chunks to visit follows from the places and documents that each chunk reaches over, so it costs O(C^2) and not
    O(S^2): a chunk pair is skipped when no pair of its tokens can see each other.
    """
    documents_BS, window, keys = context.documents_BS, facts.window, context.keys
    B, S = context.positions_BS.shape
    q_place_S, k_place_T = _places(context)
    k_documents_BT, cut = (documents_BS, False) if keys is None else (keys.documents_BT, True)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Within a document, order of place is order of position.
        q_place, k_place = (q_place_S[q], k_place_T[k]) if cut else (q, k)
        keep = k_place <= q_place
        if window is not None:
            keep = keep & (k_place > q_place - window)
        if documents_BS is not None and k_documents_BT is not None:
            keep = keep & (documents_BS[b, q] == k_documents_BT[b, k])
        return keep

    q_first_C, q_last_C = (place_1C[0, :, None] for place_1C in _reach(q_place_S[None]))
    k_first_C, k_last_C = (place_1C[0, None, :] for place_1C in _reach(k_place_T[None]))
    visit_BCC = (k_first_C <= q_last_C)[None].expand(B, -1, -1)
    if window is not None:
        visit_BCC = visit_BCC & (k_last_C > q_first_C - window)
    if documents_BS is not None and k_documents_BT is not None:
        (q_first_BC, q_last_BC), (k_first_BC, k_last_BC) = _reach(documents_BS), _reach(k_documents_BT)
        visit_BCC = visit_BCC & (q_first_BC[:, :, None] <= k_last_BC[:, None, :])
        visit_BCC = visit_BCC & (k_first_BC[:, None, :] <= q_last_BC[:, :, None])
    counts_BHC = visit_BCC.sum(-1, dtype=torch.int32)[:, None]
    order_BHCC = visit_BCC.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)[:, None]
    lengths = S, k_place_T.shape[0]
    return BlockMask.from_kv_blocks(counts_BHC, order_BHCC, BLOCK_SIZE=CHUNK, mask_mod=sees, seq_lengths=lengths)


def _places(context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Where queries and keys stand in their row.  -> q_place_S, k_place_T"""
    if context.keys is not None:
        return context.keys.query_places_S, context.keys.places_T
    index_S = torch.arange(context.positions_BS.shape[1], device=context.positions_BS.device, dtype=torch.int32)
    return index_S, index_S


def _reach(values_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each 128-token chunk.  -> least_BC, largest_BC"""
    B, S = values_BS.shape
    C = -(-S // CHUNK)
    padded_BCL = torch.nn.functional.pad(values_BS, (0, C * CHUNK - S), mode="replicate").view(B, C, CHUNK)
    return padded_BCL.amin(-1), padded_BCL.amax(-1)
