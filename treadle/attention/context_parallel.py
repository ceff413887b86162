"""Attention over rows that are cut over ranks (context parallelism), around the backends that compute it locally.

gather: keys and values of all ranks come to each (and their gradients go back, summed); queries stay. Any facts; plain
    causal rows are computed chunk by chunk, by kernels that know no places of tokens (`treadle.attention.chunks`).
ulysses: for the time of attention, a rank has whole rows of some heads instead of all heads of a part of the rows
    (Jacobs et al. 2023, arXiv:2309.14509). Any facts and any backend; heads and key-value heads have to divide.
ring: keys and values travel from rank to rank, see `treadle.attention.ring`.

Collectives are PyTorch's functional ones, which autograd, `torch.compile` and activation checkpointing know.

B batch, S this rank's tokens, T tokens of whole rows, H heads, G key-value heads, K head dim, V value dim, C ranks,
N heads of either kind on this rank, X whatever a token has.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from treadle.attention import ring
from treadle.attention.chunks import fusible
from treadle.attention.context import AttentionContext, Keys
from treadle.attention.facts import AttentionFacts
from treadle.attention.parts import Parts
from treadle.errors import ConfigError
from treadle.kernels import collectives

Attend = Callable[[Tensor, Tensor, Tensor, AttentionFacts, AttentionContext, Tensor | None], Tensor]

KEYS = "keys of all ranks"  # in the tables of a context


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None,
    local: Attend,
) -> Tensor:
    """Attention of this rank's queries to the whole rows.  -> out_BSHV

    local: attention on one rank, of the same arguments. Raises ConfigError where the method cannot compute this.
    """
    parts = parts_of(context)
    if parts.method == "gather":
        if k_BSGK.shape[1] == q_BSHK.shape[1]:
            k_BSGK, v_BSGV = gathered(context, k_BSGK, v_BSGV)
        if fusible(q_BSHK, facts, context, v_BSGV.shape[-1]):
            return ring.attend(q_BSHK, k_BSGK, v_BSGV, facts, context, None)
        return local(q_BSHK, k_BSGK, v_BSGV, facts, in_rank_order(context), sinks_H)
    if parts.method == "ring":
        return ring.attend(q_BSHK, k_BSGK, v_BSGV, facts, context, sinks_H)
    return _ulysses(q_BSHK, k_BSGK, v_BSGV, facts, context, sinks_H, local)


def gathered(context: AttentionContext, *tensors: Tensor) -> list[Tensor]:
    """Of what keys and values are made of, all ranks' x_BTX in rank order. What is made of them may be attended to.

    As it is where rows are not cut, or the method does not gather.
    """
    if context.parts is None or context.parts.method != "gather":
        return list(tensors)
    parts = parts_of(context)
    return collectives.gather(tensors, 1, parts.group, parts.size)


def in_rank_order(context: AttentionContext) -> AttentionContext:
    """The context of this rank's queries and all ranks' keys, as they come out of a gather."""
    keys = Keys(*context.tables.get(KEYS) or _keys(context))
    return replace(context, parts=None, whole=None, keys=keys)


def in_row_order(context: AttentionContext) -> AttentionContext:
    """The context of whole rows, that some heads of all ranks' tokens are computed with."""
    return replace(context.whole, backend=context.backend, tables=context.tables)


def shared(
    q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int
) -> tuple[AttentionContext | None, dict[str, tuple[Tensor, ...]]]:
    """The context that backends will be called with where rows are cut, None if none will be; and what of it is the
    same for all layers, as tables of the context."""
    method = parts_of(context).method
    if method == "ulysses":
        return in_row_order(context), {}
    if method == "ring" or fusible(q_BSHK, facts, context, value_dim):
        return None, {}
    tables = {KEYS: _keys(context)}
    return in_rank_order(replace(context, tables=tables)), tables


def _keys(context: AttentionContext) -> tuple[Tensor, ...]:
    """What `Keys` are made of, of all ranks' keys in rank order."""
    parts, whole = parts_of(context), context.whole
    place_T = torch.arange(whole.positions_BS.shape[1], device=context.positions_BS.device, dtype=torch.int32)
    documents = () if whole.documents_BS is None else (parts.to_rank_order(whole.documents_BS),)
    return parts.cut(place_T, dim=0), parts.to_rank_order(place_T, dim=0), *documents


def joined(values_BS: Tensor, context: AttentionContext) -> Tensor:
    """All ranks' values in row order, whole numbers say.  -> values_BT"""
    parts = parts_of(context)
    return parts.to_row_order(collectives.gather([values_BS], 1, parts.group, parts.size)[0])


def parts_of(context: AttentionContext) -> Parts:
    assert context.parts is not None, "the context's rows are not cut"
    if context.cache is not None:
        raise ConfigError("a cache cannot be read where rows are cut over ranks; generate from whole rows")
    return context.parts


def refusal(method: str, ranks: int, heads: int, kv_heads: int) -> tuple[str, int] | None:
    """Why attention with so many heads cannot be computed by this method: the key to blame and its size."""
    if method == "ulysses":
        for key, count in (("heads", heads), ("kv_heads", kv_heads)):
            if count % ranks:
                return key, count
    return None


def _ulysses(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None,
    local: Attend,
) -> Tensor:
    parts, H = parts_of(context), q_BSHK.shape[2]
    if (found := refusal("ulysses", parts.size, H, k_BSGK.shape[2])) is not None:
        raise ConfigError(f"ulysses deals heads to {parts.size} ranks, which does not divide {found[0]}={found[1]}")
    started = [_to_heads(x, parts) for x in (q_BSHK, k_BSGK, v_BSGV)]  # side by side
    q_BTNK, k_BTNK, v_BTNV = (_whole_rows(x, parts) for x in started)
    N = H // parts.size
    if sinks_H is not None:
        sinks_H = sinks_H.narrow(0, parts.rank * N, N)
    first, count = facts.heads or (0, H)
    facts = replace(facts, heads=(first + parts.rank * N, count))
    return _to_tokens(local(q_BTNK, k_BTNK, v_BTNV, facts, in_row_order(context), sinks_H), parts)


def _to_heads(x_BSHK: Tensor, parts: Parts) -> Tensor:
    """Send each rank its heads of this rank's tokens.  -> x_CBSNK of the ranks' tokens, on its way"""
    x_CBSNK = torch.stack(x_BSHK.chunk(parts.size, dim=2))
    return _exchange(x_CBSNK, parts)


def _whole_rows(x_CBSNK: Tensor, parts: Parts) -> Tensor:
    x_BTNK = torch.cat(funcol.wait_tensor(x_CBSNK).unbind(0), dim=1)
    return parts.to_row_order(x_BTNK)


def _to_tokens(x_BTNV: Tensor, parts: Parts) -> Tensor:
    """Back: each rank gets its tokens of this rank's heads.  -> x_BSHV"""
    x_CBSNV = torch.stack(parts.to_rank_order(x_BTNV).chunk(parts.size, dim=1))
    return torch.cat(funcol.wait_tensor(_exchange(x_CBSNV, parts)).unbind(0), dim=2)


def _exchange(x_C: Tensor, parts: Parts) -> Tensor:
    """x_C[r] goes to rank r; what came from it takes its place."""
    group: Any = parts.group
    return funcol.all_to_all_single_autograd(x_C.contiguous(), None, None, group)
