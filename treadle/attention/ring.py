"""Attention of this rank's queries to all ranks' keys, one pair of chunks after the other.

ring: keys and values travel from rank to rank, and no rank ever holds all of them (arXiv:2310.01889). The backward
sends them round once more, and their gradients with them. While a part is computed with, the next is on its way. For
rows so long that the keys and values of all ranks do not fit in memory, even of one layer at a time.

gathered: all of them are here already, in rank order. For causal attention without further conditions, whose pairs are
computed by kernels that know no places of tokens.

It is an operator of our own: the compiler does not look inside, and activation checkpointing may keep its output. Pairs
of a rank's chunks that cannot see each other are skipped; see `treadle.attention.chunks` for those that can.

B batch, S this rank's tokens, T tokens of whole rows, H heads, G key-value heads, K head dim, V value dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treadle.attention.chunks import Merged, Pair, Pairs, fusible
from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts
from treadle.attention.parts import Parts


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None,
) -> Tensor:
    """Keys and values are this rank's, or gathered: all ranks'.  -> out_BSHV"""
    parts = context.parts
    assert parts is not None
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    documents_BT = context.whole.documents_BS
    statics = (facts.scale or q_BSHK.shape[-1] ** -0.5, facts.window, facts.softcap, facts.alibi)
    heads = facts.heads or (0, q_BSHK.shape[2])
    where = (parts.order, parts.group, parts.rank, parts.size)
    fused = fusible(q_BSHK, facts, context, v_BSGV.shape[-1])
    out_BSHV, lse_BSH = torch.ops.treadle.ring_attention(
        q_BSHK, k_BSGK, v_BSGV, documents_BT, *statics, *heads, *where, fused
    )
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
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """-> out_BSHV and lse_BSH, the logarithm of each softmax's denominator; both float32 or wider, but for the output
    of fused kernels, which is in the dtype of the queries"""
    statics = scale, window, softcap, alibi, first_head, all_heads, order, group, rank, size, fused
    pairs, merged = _pairs(q_BSHK, documents_BT, *statics), Merged(q_BSHK, v_BSGV.shape[3])
    for held, seen in _round(q_BSHK, [k_BSGK.contiguous(), v_BSGV.contiguous()], pairs):
        for pair in seen:
            merged.add(pair.queries, *pair.forward(q_BSHK, *held))
    return merged.out_BSHV.to(q_BSHK.dtype) if fused else merged.out_BSHV, merged.lse_BSH


@_forward.register_fake
def _(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *statics: Any) -> tuple[Tensor, Tensor]:
    wide, fused = torch.promote_types(q_BSHK.dtype, torch.float32), statics[-1]
    out_BSHV = q_BSHK.new_empty(*q_BSHK.shape[:3], v_BSGV.shape[3], dtype=q_BSHK.dtype if fused else wide)
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
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq_BSHK, dk_BSGK, dv_BSGV"""
    statics = scale, window, softcap, alibi, first_head, all_heads, order, group, rank, size, fused
    pairs, wide = _pairs(q_BSHK, documents_BT, *statics), lse_BSH.dtype
    dout_BSHV = dout_BSHV.contiguous()
    dq_BSHK = torch.zeros(q_BSHK.shape, dtype=wide, device=q_BSHK.device)
    sums: _Travel | None = None
    found: list[Tensor] = []
    for held, seen in _round(q_BSHK, [k_BSGK.contiguous(), v_BSGV.contiguous()], pairs):
        found = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in held]
        for pair in seen:
            dq, dk, dv = pair.backward(dout_BSHV, dlse_BSH, (q_BSHK, held[0], held[1]), out_BSHV, lse_BSH)
            dq_BSHK[:, pair.queries] += dq
            found[0][:, pair.keys] += dk
            found[1][:, pair.keys] += dv
        if _gathered(q_BSHK, k_BSGK):
            break
        # What earlier ranks have summed of these keys' gradients has arrived meanwhile; after the last step they are
        # those of the next rank, where they go like all the others.
        if sums is not None:
            found = [mine + theirs for mine, theirs in zip(found, sums.arrived(), strict=True)]
        sums = _Travel(found, pairs.parts)
    dk_BSGK, dv_BSGV = found if sums is None else sums.arrived()
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
    return *backward(dout_BSHV, dlse_BSH, *ctx.saved_tensors, *ctx.statics), *[None] * 12


_forward.register_autograd(_gradients, setup_context=_save)


def _pairs(q_BSHK: Tensor, documents_BT: Tensor | None, *statics: Any) -> Pairs:
    """Of what the operators are called with."""
    scale, window, softcap, alibi, first_head, all_heads, order, group, rank, size, fused = statics
    heads = first_head, all_heads
    facts = AttentionFacts(scale=scale, window=window, softcap=softcap, alibi=alibi, heads=heads)
    return Pairs.of(q_BSHK, documents_BT, facts, Parts("ring", order, group, rank, size), fused)


def _gathered(q_BSHK: Tensor, k_BSGK: Tensor) -> bool:
    return k_BSGK.shape[1] != q_BSHK.shape[1]


def _round(q_BSHK: Tensor, held: list[Tensor], pairs: Pairs) -> Iterator[tuple[list[Tensor], Iterator[Pair]]]:
    """Keys and values of each rank, this one's own first, and the pairs that meet there. The next are on their way.

    Of those that are gathered, all at once.
    """
    rank, size = pairs.parts.rank, pairs.parts.size
    sources = [(rank - step) % size for step in range(size)]
    if _gathered(q_BSHK, held[0]):
        yield held, (pair for source in sources for pair in pairs.seen(source, start=source * q_BSHK.shape[1]))
        return
    for source in sources:
        travel = _Travel(held, pairs.parts) if source != sources[-1] else None
        yield held, pairs.seen(source)
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
