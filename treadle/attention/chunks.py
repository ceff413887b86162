"""Attention of one chunk of queries to one chunk of keys at a time, and how the outputs of chunks become one.

Each pair of chunks gives an output and the logarithm of its softmax's denominator, from which outputs are merged. The
backward of a pair takes the merged output and denominator: its weights are then those of the whole softmax.

Pairs are computed by the definition, in pieces of queries so that memory does not grow with the square of the length,
or, where all that is asked for is causal attention, by PyTorch's fused kernels (cuDNN on a GPU).

B batch, S this rank's tokens, T tokens of whole rows, L tokens of a chunk, Q queries of a pair, H heads, G key-value
heads, R query heads of each, K head dim, V value dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.attention.context import AttentionContext, Keys
from treadle.attention.facts import AttentionFacts, alibi_bias, visible
from treadle.attention.parts import Parts

PIECE_ELEMENTS = 1 << 27  # scores at a time: half a GiB in float32

Grads = tuple[Tensor, Tensor, Tensor]


def fusible(q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int) -> bool:
    """Whether fused kernels can compute pairs of chunks: causal attention to whole rows, and nothing else."""
    plain = not (facts.alibi or facts.sinks or facts.softcap or facts.window) and context.whole.documents_BS is None
    if not plain or context.backend not in ("auto", "sdpa") or q_BSHK.shape[-1] != value_dim:
        return False
    if q_BSHK.device.type == "cuda":
        return q_BSHK.dtype in (torch.bfloat16, torch.float16) and value_dim <= 128 and value_dim % 8 == 0
    return q_BSHK.device.type == "cpu"


@dataclass(frozen=True)
class Pair:
    """Some queries of this rank and a chunk of keys, as slices of what their ranks hold.

    diagonal: they are the same tokens; else all keys come before all queries.
    """

    queries: slice
    keys: slice
    facts: AttentionFacts
    context: AttentionContext
    diagonal: bool
    fused: bool

    def forward(self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> tuple[Tensor, Tensor]:
        """-> out_BQHV, lse_BQH in float32 or wider (out of fused kernels: in the dtype of the queries)"""
        if self.fused:
            return _fused_forward(*self._cut(q_BSHK, k_BSGK, v_BSGV), self.diagonal, self.facts.scale)
        scores_BQGRL, _ = self._scores(q_BSHK, k_BSGK)
        lse_BQH = scores_BQGRL.logsumexp(-1).flatten(2, 3)
        finite_BQH = lse_BQH.masked_fill(lse_BQH == float("-inf"), 0)
        weights_BQGRL = torch.exp(scores_BQGRL - finite_BQH.view(scores_BQGRL.shape[:-1])[..., None])
        v_BLGV = v_BSGV[:, self.keys].to(weights_BQGRL.dtype)
        return torch.einsum("bqgrl,blgv->bqgrv", weights_BQGRL, v_BLGV).flatten(2, 3), lse_BQH

    def backward(self, dout_BSHV: Tensor, dlse_BSH: Tensor, tensors: Grads, out_BSHV: Tensor, lse_BSH: Tensor) -> Grads:
        """Of merged outputs and denominators.  tensors: q, k, v -> dq_BQHK, dk_BLGK, dv_BLGV"""
        queries, (q_BSHK, k_BSGK, v_BSGV) = self.queries, tensors
        out_BQHV, dout_BQHV, lse_BQH = out_BSHV[:, queries], dout_BSHV[:, queries], lse_BSH[:, queries]
        if self.fused:
            cut = self._cut(q_BSHK, k_BSGK, v_BSGV)
            return _fused_backward(dout_BQHV, *cut, out_BQHV, lse_BQH, self.diagonal, self.facts.scale)
        wide, G = lse_BSH.dtype, k_BSGK.shape[2]
        q_BQGRK, k_BLGK, v_BLGV = (x.to(wide) for x in self._cut(q_BSHK.unflatten(2, (G, -1)), k_BSGK, v_BSGV))
        scores_BQGRL, slope = self._scores(q_BSHK, k_BSGK)
        # What the softmax takes from each score's gradient: sum_j P_j dP_j, less what comes through the lse itself.
        taken_BQH = (dout_BQHV * out_BQHV).sum(-1) - dlse_BSH[:, queries]
        lse_BQGR, taken_BQGR, dout_BQGRV = (x.unflatten(2, (G, -1)) for x in (lse_BQH, taken_BQH, dout_BQHV))
        weights_BQGRL = torch.exp(scores_BQGRL - lse_BQGR[..., None])
        dv_BLGV = torch.einsum("bqgrl,bqgrv->blgv", weights_BQGRL, dout_BQGRV)
        dweights_BQGRL = torch.einsum("bqgrv,blgv->bqgrl", dout_BQGRV, v_BLGV)
        dscores_BQGRL = weights_BQGRL * (dweights_BQGRL - taken_BQGR[..., None]) * self.facts.scale
        if slope is not None:
            dscores_BQGRL = dscores_BQGRL * slope
        dq_BQGRK = torch.einsum("bqgrl,blgk->bqgrk", dscores_BQGRL, k_BLGK)
        return dq_BQGRK.flatten(2, 3), torch.einsum("bqgrl,bqgrk->blgk", dscores_BQGRL, q_BQGRK), dv_BLGV

    def _cut(self, q: Tensor, k: Tensor, v: Tensor) -> Grads:
        return q[:, self.queries], k[:, self.keys], v[:, self.keys]

    def _scores(self, q_BSHK: Tensor, k_BSGK: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores, -inf where a key is not seen, and the slope of the softcap at each.  -> scores_BQGRL, slope"""
        facts, H, G, L = self.facts, q_BSHK.shape[2], k_BSGK.shape[2], self.keys.stop - self.keys.start
        wide, slope = torch.promote_types(q_BSHK.dtype, torch.float32), None
        q_BQGRK, k_BLGK = q_BSHK[:, self.queries].to(wide).unflatten(2, (G, -1)), k_BSGK[:, self.keys].to(wide)
        assert facts.scale is not None
        scores_BQGRL = torch.einsum("bqgrk,blgk->bqgrl", q_BQGRK, k_BLGK) * facts.scale
        if facts.softcap is not None:
            turned = torch.tanh(scores_BQGRL / facts.softcap)
            scores_BQGRL, slope = facts.softcap * turned, 1 - turned.square()
        if facts.alibi:
            bias_BHQL = alibi_bias(facts, H, self.context, L, wide)
            scores_BQGRL = scores_BQGRL + bias_BHQL.unflatten(1, (G, -1)).permute(0, 3, 1, 2, 4)
        unseen_BQL = ~visible(facts, self.context, L)
        return scores_BQGRL.masked_fill(unseen_BQL[:, :, None, None], float("-inf")), slope


@dataclass(frozen=True)
class Pairs:
    """What of this rank's queries and another rank's keys can meet."""

    facts: AttentionFacts
    parts: Parts
    documents_BT: Tensor | None
    device: torch.device
    chunk: int  # tokens
    piece: int  # queries
    fused: bool

    @classmethod
    def of(
        cls, q_BSHK: Tensor, documents_BT: Tensor | None, facts: AttentionFacts, parts: Parts, fused: bool
    ) -> "Pairs":
        B, S, H, _ = q_BSHK.shape
        chunk = S // parts.each
        piece = chunk if fused else max(1, min(chunk, PIECE_ELEMENTS // (B * H * chunk)))
        return cls(facts, parts, documents_BT, q_BSHK.device, chunk, piece, fused)

    def seen(self, source: int, start: int = 0) -> Iterator[Pair]:
        """By the keys of rank `source`, which lie from `start` on. Later chunks are never seen; nor are those that no
        window reaches back to.

        The latest keys come first, so that of its own rank a query sees itself at once: a merge needs a finite lse.
        """
        L, window = self.chunk, self.facts.window
        for mine, query_chunk in enumerate(self.parts.chunks(self.parts.rank)):
            for theirs, key_chunk in sorted(enumerate(self.parts.chunks(source)), key=lambda one: -one[1]):
                distance = (query_chunk - key_chunk) * L - (L - 1)  # of the first query to the last key
                if key_chunk > query_chunk or (window is not None and distance >= window):
                    continue
                for first in range(0, L, self.piece):
                    last = min(first + self.piece, L)
                    queries = slice(query_chunk * L + first, query_chunk * L + last)
                    keys = slice(key_chunk * L, (key_chunk + 1) * L)
                    at = start + theirs * L
                    held = slice(mine * L + first, mine * L + last), slice(at, at + L)
                    context = self._context(queries, keys)
                    yield Pair(*held, self.facts, context, query_chunk == key_chunk, self.fused)

    def _context(self, queries: slice, keys: slice) -> AttentionContext:
        query_places, key_places = (
            torch.arange(x.start, x.stop, device=self.device, dtype=torch.int32) for x in (queries, keys)
        )
        positions = query_places[None]  # not asked for: masks and biases look at places
        if self.documents_BT is None:
            return AttentionContext(positions, keys=Keys(query_places, key_places))
        query_documents, key_documents = self.documents_BT[:, queries], self.documents_BT[:, keys]
        return AttentionContext(positions, query_documents, keys=Keys(query_places, key_places, key_documents))


class Merged:
    """The outputs of the pairs so far, of a softmax over all their keys.  out_BSHV, lse_BSH: float32 or wider"""

    def __init__(self, q_BSHK: Tensor, value_dim: int):
        wide = torch.promote_types(q_BSHK.dtype, torch.float32)
        self.out_BSHV = torch.zeros(*q_BSHK.shape[:3], value_dim, dtype=wide, device=q_BSHK.device)
        self.lse_BSH = torch.full(q_BSHK.shape[:3], float("-inf"), dtype=wide, device=q_BSHK.device)

    def add(self, queries: slice, new_BQHV: Tensor, new_BQH: Tensor) -> None:
        old_BQH = self.lse_BSH[:, queries]
        both_BQH = torch.logaddexp(old_BQH, new_BQH)
        old_share, new_share = (torch.exp(part - both_BQH)[..., None] for part in (old_BQH, new_BQH))
        self.out_BSHV[:, queries] = self.out_BSHV[:, queries] * old_share + new_BQHV * new_share
        self.lse_BSH[:, queries] = both_BQH


# PyTorch's kernels, with heads before tokens. Dropout's seed and offset, and boundaries of documents, are not used.


def _fused_forward(
    q_BQHK: Tensor, k_BLGK: Tensor, v_BLGV: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q_BQHK, k_BLGK, v_BLGV))
    if q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse.view(q.shape[:3]).transpose(1, 2)


def _fused_backward(
    dout_BQHV: Tensor,
    q_BQHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    out_BQHV: Tensor,
    lse_BQH: Tensor,
    causal: bool,
    scale: float | None,
) -> Grads:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BQHV, q_BQHK, k_BLGK, v_BLGV, out_BQHV))
    lse_BHQ, groups = lse_BQH.transpose(1, 2).contiguous(), k.shape[1]
    if q.is_cuda:
        unused: Any = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = q.shape[2], k.shape[2]
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse_BHQ[..., None], unused, unused, None, None, None, *lengths, 0.0, causal, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in found)  # type: ignore[return-value]
    k, v = (x.repeat_interleave(q.shape[1] // groups, dim=1) for x in (k, v))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse_BHQ, 0.0, causal, scale=scale
    )
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
