"""Ring attention: keys and values travel from rank to rank, and no rank ever holds all of them (arXiv:2310.01889).

A rank attends to one part after the other; each gives an output and the logarithm of its softmax's denominator, from
which the parts' outputs are merged. The backward sends keys and values round once more, and their gradients with them.
While a part is computed with, the next is on its way. For rows so long that the keys and values of all ranks do not fit
in memory, even of one layer at a time; `gather` is simpler and has less to wait for.

It is an operator of our own: the compiler does not look inside, and activation checkpointing may keep its output. Pairs
of a rank's chunks that cannot see each other are skipped; those that can are computed by the definition, in pieces of
queries, so that memory does not grow with the square of the length.

B batch, S this rank's tokens, T tokens of whole rows, L tokens of a chunk, Q queries of a piece, H heads, G key-value
heads, R query heads of each, K head dim, V value dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treadle.attention.context import AttentionContext, Keys
from treadle.attention.facts import AttentionFacts, alibi_bias, visible
from treadle.attention.parts import Parts

PIECE_ELEMENTS = 1 << 27  # scores at a time: half a GiB in float32


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None,
) -> Tensor:
    """-> out_BSHV"""
    parts = context.parts
    assert parts is not None
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    documents_BT = context.whole.documents_BS
    statics = (facts.scale or q_BSHK.shape[-1] ** -0.5, facts.window, facts.softcap, facts.alibi)
    heads = facts.heads or (0, q_BSHK.shape[2])
    where = (parts.order, parts.group, parts.rank, parts.size)
    out_BSHV, lse_BSH = torch.ops.treadle.ring_attention(q_BSHK, k_BSGK, v_BSGV, documents_BT, *statics, *heads, *where)
    if sinks_H is not None:
        # A sink takes its share of the softmax from all keys alike: exp(lse) / (exp(lse) + exp(sink)) is left to them.
        out_BSHV = out_BSHV * torch.sigmoid(lse_BSH - sinks_H.to(wide))[..., None]
    return out_BSHV.to(q_BSHK.dtype)


@torch.library.custom_op("treadle::ring_attention", mutates_args=())
def _forward(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    documents_BT: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi: float,
    first_head: int,
    all_heads: int,
    order: str,
    group: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """-> out_BSHV and lse_BSH, the logarithm of each softmax's denominator, both float32 or wider"""
    pairs = _Pairs.of(
        q_BSHK, documents_BT, scale, window, softcap, alibi, first_head, all_heads, order, group, rank, size
    )
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    out_BSHV = torch.zeros(*q_BSHK.shape[:3], v_BSGV.shape[3], dtype=wide, device=q_BSHK.device)
    lse_BSH = torch.full(q_BSHK.shape[:3], float("-inf"), dtype=wide, device=q_BSHK.device)
    for held, seen in _round([k_BSGK.contiguous(), v_BSGV.contiguous()], pairs):
        for pair in seen:
            scores_BQGRL, _ = pair.scores(q_BSHK, held[0])
            new_BQH = scores_BQGRL.logsumexp(-1).flatten(2, 3)
            finite_BQH = new_BQH.masked_fill(new_BQH == float("-inf"), 0)
            weights_BQGRL = torch.exp(scores_BQGRL - finite_BQH.view(scores_BQGRL.shape[:-1])[..., None])
            new_BQHV = torch.einsum("bqgrl,blgv->bqgrv", weights_BQGRL, held[1][:, pair.keys].to(wide)).flatten(2, 3)
            old_BQH = lse_BSH[:, pair.queries]
            both_BQH = torch.logaddexp(old_BQH, new_BQH)
            old_share, new_share = (torch.exp(part - both_BQH)[..., None] for part in (old_BQH, new_BQH))
            out_BSHV[:, pair.queries] = out_BSHV[:, pair.queries] * old_share + new_BQHV * new_share
            lse_BSH[:, pair.queries] = both_BQH
    return out_BSHV, lse_BSH


@_forward.register_fake
def _(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *statics: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    out_BSHV = q_BSHK.new_empty(*q_BSHK.shape[:3], v_BSGV.shape[3], dtype=wide)
    return out_BSHV, q_BSHK.new_empty(q_BSHK.shape[:3], dtype=wide)


@torch.library.custom_op("treadle::ring_attention_backward", mutates_args=())
def _backward(
    dout_BSHV: Tensor,
    dlse_BSH: Tensor,
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    out_BSHV: Tensor,
    lse_BSH: Tensor,
    documents_BT: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi: float,
    first_head: int,
    all_heads: int,
    order: str,
    group: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq_BSHK, dk_BSGK, dv_BSGV"""
    pairs = _Pairs.of(
        q_BSHK, documents_BT, scale, window, softcap, alibi, first_head, all_heads, order, group, rank, size
    )
    wide, G = lse_BSH.dtype, k_BSGK.shape[2]
    # What the softmax takes from each score's gradient: sum_j P_j dP_j, less what comes through the lse itself.
    taken_BSH = (dout_BSHV * out_BSHV).sum(-1) - dlse_BSH
    dq_BSHK = torch.zeros(q_BSHK.shape, dtype=wide, device=q_BSHK.device)
    sums: _Travel | None = None
    for held, seen in _round([k_BSGK.contiguous(), v_BSGV.contiguous()], pairs):
        dk_BSGK, dv_BSGV = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in held)
        for pair in seen:
            queries, keys = pair.queries, pair.keys
            scores_BQGRL, slope = pair.scores(q_BSHK, held[0])
            lse_BQGR, taken_BQGR = (x[:, queries].unflatten(2, (G, -1)) for x in (lse_BSH, taken_BSH))
            dout_BQGRV = dout_BSHV[:, queries].unflatten(2, (G, -1))
            weights_BQGRL = torch.exp(scores_BQGRL - lse_BQGR[..., None])
            dv_BSGV[:, keys] += torch.einsum("bqgrl,bqgrv->blgv", weights_BQGRL, dout_BQGRV)
            dweights_BQGRL = torch.einsum("bqgrv,blgv->bqgrl", dout_BQGRV, held[1][:, keys].to(wide))
            dscores_BQGRL = weights_BQGRL * (dweights_BQGRL - taken_BQGR[..., None]) * scale
            if slope is not None:
                dscores_BQGRL = dscores_BQGRL * slope
            dq_BQGRK = torch.einsum("bqgrl,blgk->bqgrk", dscores_BQGRL, held[0][:, keys].to(wide))
            dq_BSHK[:, queries] += dq_BQGRK.flatten(2, 3)
            q_BQGRK = q_BSHK[:, queries].to(wide).unflatten(2, (G, -1))
            dk_BSGK[:, keys] += torch.einsum("bqgrl,bqgrk->blgk", dscores_BQGRL, q_BQGRK)
        # What earlier ranks have summed of these keys' gradients has arrived meanwhile; after the last step they are
        # those of the next rank, where they go like all the others.
        found = [dk_BSGK, dv_BSGV]
        if sums is not None:
            found = [mine + theirs for mine, theirs in zip(found, sums.arrived(), strict=True)]
        sums = _Travel(found, pairs.parts)
    assert sums is not None
    dk_BSGK, dv_BSGV = sums.arrived()
    return dq_BSHK.to(q_BSHK.dtype), dk_BSGK.to(k_BSGK.dtype), dv_BSGV.to(v_BSGV.dtype)


@_backward.register_fake
def _(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BSHK, k_BSGK, v_BSGV, documents_BT, *statics = inputs
    ctx.save_for_backward(q_BSHK, k_BSGK, v_BSGV, *output, documents_BT)
    ctx.statics = statics


def _gradients(ctx: Any, dout_BSHV: Tensor, dlse_BSH: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.treadle.ring_attention_backward
    return *backward(dout_BSHV, dlse_BSH, *ctx.saved_tensors, *ctx.statics), *[None] * 11


_forward.register_autograd(_gradients, setup_context=_save)


@dataclass(frozen=True)
class _Pair:
    """Some queries of this rank and a chunk of keys, as slices of what their ranks hold."""

    queries: slice
    keys: slice
    facts: AttentionFacts
    context: AttentionContext

    def scores(self, q_BSHK: Tensor, k_BSGK: Tensor) -> tuple[Tensor, Tensor | None]:
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
class _Pairs:
    """What of this rank's queries and another rank's keys can meet."""

    facts: AttentionFacts
    parts: Parts
    documents_BT: Tensor | None
    device: torch.device
    chunk: int  # tokens
    piece: int  # queries

    @classmethod
    def of(
        cls,
        q_BSHK: Tensor,
        documents_BT: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        alibi: float,
        first_head: int,
        all_heads: int,
        order: Any,
        *where: Any,
    ) -> "_Pairs":
        heads = first_head, all_heads
        facts = AttentionFacts(scale=scale, window=window, softcap=softcap, alibi=alibi, heads=heads)
        parts, (B, S, H, _) = Parts("ring", order, *where), q_BSHK.shape
        chunk = S // parts.each
        return cls(
            facts, parts, documents_BT, q_BSHK.device, chunk, max(1, min(chunk, PIECE_ELEMENTS // (B * H * chunk)))
        )

    def seen(self, source: int) -> Iterator[_Pair]:
        """By the keys of rank `source`. Later chunks are never seen; nor are those that no window reaches back to.

        The latest keys come first, so that of its own rank a query sees itself at once: a merge needs a finite lse.
        """
        L, window = self.chunk, self.facts.window
        for mine, query_chunk in enumerate(self.parts.chunks(self.parts.rank)):
            for theirs, key_chunk in sorted(enumerate(self.parts.chunks(source)), key=lambda one: -one[1]):
                distance = (query_chunk - key_chunk) * L - (L - 1)  # of the first query to the last key
                if key_chunk > query_chunk or (window is not None and distance >= window):
                    continue
                for start in range(0, L, self.piece):
                    stop = min(start + self.piece, L)
                    queries = slice(query_chunk * L + start, query_chunk * L + stop)
                    keys = slice(key_chunk * L, (key_chunk + 1) * L)
                    held = slice(mine * L + start, mine * L + stop), slice(theirs * L, (theirs + 1) * L)
                    yield _Pair(*held, self.facts, self._context(queries, keys))

    def _context(self, queries: slice, keys: slice) -> AttentionContext:
        query_places, key_places = (
            torch.arange(x.start, x.stop, device=self.device, dtype=torch.int32) for x in (queries, keys)
        )
        positions = query_places[None]  # not asked for: masks and biases look at places
        if self.documents_BT is None:
            return AttentionContext(positions, keys=Keys(query_places, key_places))
        query_documents, key_documents = self.documents_BT[:, queries], self.documents_BT[:, keys]
        return AttentionContext(positions, query_documents, keys=Keys(query_places, key_places, key_documents))


def _round(held: list[Tensor], pairs: _Pairs) -> Iterator[tuple[list[Tensor], Iterator[_Pair]]]:
    """Keys and values of each rank, this one's own first, and the pairs that meet there. The next are on their way."""
    rank, size = pairs.parts.rank, pairs.parts.size
    for step in range(size):
        travel = _Travel(held, pairs.parts) if step < size - 1 else None
        yield held, pairs.seen((rank - step) % size)
        if travel is not None:
            held = travel.arrived()


class _Travel:
    """Tensors on their way to the next rank, while those of the rank before come here."""

    def __init__(self, tensors: list[Tensor], parts: Parts):
        group = dist.distributed_c10d._resolve_process_group(parts.group)  # type: ignore[arg-type]
        after, before = (dist.get_global_rank(group, (parts.rank + by) % parts.size) for by in (1, -1))
        self.sent, self.coming = tensors, [torch.empty_like(x) for x in tensors]  # kept alive until they have arrived
        sends = [dist.P2POp(dist.isend, x, after, group, tag) for tag, x in enumerate(self.sent)]
        receives = [dist.P2POp(dist.irecv, x, before, group, tag) for tag, x in enumerate(self.coming)]
        self.work = dist.batch_isend_irecv(sends + receives)

    def arrived(self) -> list[Tensor]:
        for work in self.work:
            work.wait()
        return self.coming
