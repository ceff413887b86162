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
from treadle.attention.facts import AttentionFacts, slopes

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
    softcap, keys = facts.softcap, context.keys
    slopes_H = slopes(facts, q_BSHK.shape[2], q_BSHK.device) if facts.alibi else None

    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes_H is not None:  # within a document, a distance of places is one of positions
            distance = q - k if keys is None else keys.query_places_S[q] - keys.places_T[k]
            score = score - slopes_H[h] * distance
        return score

    return change


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def key(facts: AttentionFacts) -> str:
    """The name in `context.tables` of the chunks to visit, which depend on this fact alone."""
    return f"chunks window={facts.window}"


def tables(facts: AttentionFacts, context: AttentionContext) -> tuple[Tensor, ...]:
    """Which chunks of 128 keys each chunk of queries visits, and the other way round.

    A chunk pair is skipped when no pair of its tokens can see each other, which follows from the places and documents
    that each chunk reaches over: so it costs O(C^2) and not O(S^2). N chunks of queries, C of keys:
    -> counts_B1N and order_B1NC of keys by queries, then counts_B1C and order_B1CN of queries by keys; int32
    """
    documents_BS, window = context.documents_BS, facts.window
    q_place_S, k_place_T = _places(context)
    q_first_N1, q_last_N1 = (place_1N[0, :, None] for place_1N in _reach(q_place_S[None]))
    k_first_1C, k_last_1C = _reach(k_place_T[None])
    visit_BNC = (k_first_1C <= q_last_N1)[None].expand(context.positions_BS.shape[0], -1, -1)
    if window is not None:
        visit_BNC = visit_BNC & (k_last_1C > q_first_N1 - window)
    k_documents_BT = documents_BS if context.keys is None else context.keys.documents_BT
    if documents_BS is not None and k_documents_BT is not None:
        (q_first_BN, q_last_BN), (k_first_BC, k_last_BC) = _reach(documents_BS), _reach(k_documents_BT)
        visit_BNC = visit_BNC & (q_first_BN[:, :, None] <= k_last_BC[:, None, :])
        visit_BNC = visit_BNC & (k_first_BC[:, None, :] <= q_last_BN[:, :, None])
    return *_ordered(visit_BNC), *_ordered(visit_BNC.mT)


def _ordered(visit_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """How many chunks each row visits; all chunks, those first."""
    order_BNC = visit_BNC.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return visit_BNC.sum(-1, dtype=torch.int32)[:, None].contiguous(), order_BNC.to(torch.int32)[:, None].contiguous()


def block_mask(facts: AttentionFacts, context: AttentionContext) -> BlockMask:
    """The mask as flex wants it: the chunks to visit, and a function for the elements inside."""
    documents_BS, window, keys = context.documents_BS, facts.window, context.keys
    S = context.positions_BS.shape[1]
    k_documents_BT = documents_BS if keys is None else keys.documents_BT

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Within a document, order of place is order of position; of whole rows, a place is an index.
        q_place, k_place = (q, k) if keys is None else (keys.query_places_S[q], keys.places_T[k])
        keep = k_place <= q_place
        if window is not None:
            keep = keep & (k_place > q_place - window)
        if documents_BS is not None and k_documents_BT is not None:
            keep = keep & (documents_BS[b, q] == k_documents_BT[b, k])
        return keep

    kv_counts, kv_order, q_counts, q_order = context.tables.get(key(facts)) or tables(facts, context)
    return BlockMask(
        seq_lengths=(S, S if keys is None else keys.places_T.shape[0]),
        kv_num_blocks=kv_counts,
        kv_indices=kv_order,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=q_counts,
        q_indices=q_order,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(CHUNK, CHUNK),
        mask_mod=sees,
    )


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
