"""Attention through `flex_attention` (CUDA): every fact that the reference knows, at near-flash speed.

B batch, S sequence, H heads, G key-value heads, K head dim, V value dim, C number of 128-token chunks in a row.
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
        score_mod=_score_mod(facts, q_BSHK),
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


def _score_mod(facts: AttentionFacts, q_BSHK: Tensor) -> Callable[..., Tensor] | None:
    """What happens to a scaled score before the softmax, as flex wants it."""
    if facts.softcap is None and not facts.alibi:
        return None
    softcap = facts.softcap
    slopes_H = slopes(facts, q_BSHK.shape[2], q_BSHK.device) if facts.alibi else None

    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes_H is not None:
            score = score - slopes_H[h] * (q - k)  # within a document, a distance of indices is one of positions
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

    A chunk pair is skipped when no pair of its tokens can see each other, which follows from each chunk's first and
    last document and position: so it costs O(C^2) and not O(S^2).
    -> counts_B1C and order_B1CC of keys by queries, then of queries by keys; int32
    """
    documents_BS, positions_BS, window = context.documents_BS, context.positions_BS, facts.window
    B, S = positions_BS.shape
    C = -(-S // CHUNK)
    chunk = torch.arange(C, device=positions_BS.device)
    visit_BCC = (chunk[:, None] >= chunk[None, :])[None].expand(B, C, C)
    if window is not None:
        visit_BCC = visit_BCC & ((chunk[None, :] + 1) * CHUNK > chunk[:, None] * CHUNK - window + 1)
    if documents_BS is not None:
        padded_BCL = torch.nn.functional.pad(documents_BS, (0, C * CHUNK - S), mode="replicate").view(B, C, CHUNK)
        first_BC, last_BC = padded_BCL[..., 0], padded_BCL[..., -1]
        visit_BCC = visit_BCC & (first_BC[:, :, None] <= last_BC[:, None, :])
    return *_ordered(visit_BCC), *_ordered(visit_BCC.mT)


def _ordered(visit_BCC: Tensor) -> tuple[Tensor, Tensor]:
    """How many chunks each row visits; all chunks, those first."""
    order_BCC = visit_BCC.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return visit_BCC.sum(-1, dtype=torch.int32)[:, None].contiguous(), order_BCC.to(torch.int32)[:, None].contiguous()


def block_mask(facts: AttentionFacts, context: AttentionContext) -> BlockMask:
    """The mask as flex wants it: the chunks to visit, and a function for the elements inside."""
    documents_BS, window = context.documents_BS, facts.window
    S = context.positions_BS.shape[1]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        keep = k <= q  # within a document, order of index is order of position
        if window is not None:
            keep = keep & (k > q - window)
        if documents_BS is not None:
            keep = keep & (documents_BS[b, q] == documents_BS[b, k])
        return keep

    kv_counts, kv_order, q_counts, q_order = context.tables.get(key(facts)) or tables(facts, context)
    return BlockMask(
        seq_lengths=(S, S),
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
