"""Which backend computes attention: the one that was named, or the fastest measured one that can.

`benchmarks/attention.py` measures them; docs/benchmarks.md holds its table.
"""

from types import ModuleType

import torch
from torch import Tensor

from treadle.attention import context_parallel, flash, flash4, flex, reference, sdpa, tilelang
from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts, slopes
from treadle.attention.paged import PagedCache, by_rows, gather
from treadle.config.base import nearest
from treadle.errors import ConfigError
from treadle.kernels import PAGED_ATTENTION

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "sdpa": sdpa,
    "flash": flash,
    "flash4": flash4,
    "flex": flex,
    "tilelang": tilelang,
}


def attend(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention of queries over the keys they may see.

    q_BSHK, k_BTGK, v_BTGV -> out_BSHV, with H a multiple of G (grouped queries); V may differ from K. sinks_H: one
    logit per head, given exactly when `facts.sinks`. Raises ConfigError when the backend that `context.backend` names
    cannot compute these facts; a named backend is never replaced by another. Where rows are cut over ranks (`parts` of
    the context), q, k and v are of this rank's tokens, and so is the output; k and v may be of all `gathered` ones.
    """
    if facts.sinks != (sinks_H is not None):
        raise ValueError(f"facts.sinks is {facts.sinks}, sinks_H is {'missing' if sinks_H is None else 'given'}")
    if context.parts is not None:
        return context_parallel.attend(q_BSHK, k_BTGK, v_BTGV, facts, context, sinks_H, attend)
    if isinstance(context.cache, PagedCache):
        return _attend_pages(q_BSHK, k_BTGK, v_BTGV, facts, context, sinks_H)
    backend = BACKENDS[choose(q_BSHK, facts, context, v_BTGV.shape[-1])]
    return backend.attend(q_BSHK, k_BTGK, v_BTGV, facts, context, sinks_H)


def _attend_pages(
    q_1THK: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None,
) -> Tensor:
    """Each request's queries over its pages, as they lie; or gathered, by the backend that was named or on a CPU."""
    pages, (H, K) = context.cache.pages, q_1THK.shape[2:]
    if context.backend == "auto":
        # Latent attention: what it keeps of a token is its key, and begins with its value.
        values = None if v_pages.data_ptr() == k_pages.data_ptr() else v_pages
        slopes_H = slopes(facts, H, q_1THK.device) if facts.alibi else None
        tensors = q_1THK[0], k_pages, values, pages.tables_RP, pages.lengths_R, pages.starts_N
        static = pages.longest == 1, v_pages.shape[-1], facts.window, facts.scale or K**-0.5, facts.softcap
        if PAGED_ATTENTION.worthwhile(*tensors, *static, slopes_H, sinks_H):
            return torch.ops.treadle.paged_attention(*tensors, *static, slopes_H, sinks_H)[None]  # type: ignore[no-any-return]
    rows, q_RSHK = by_rows(pages, context), pages.rows(q_1THK)
    k_RTGK, v_RTGV = gather(pages, k_pages).to(q_1THK.dtype), gather(pages, v_pages).to(q_1THK.dtype)
    backend = BACKENDS[choose(q_RSHK, facts, rows, v_RTGV.shape[-1])]
    return pages.row(backend.attend(q_RSHK, k_RTGK, v_RTGV, facts, rows, sinks_H), q_1THK.shape[1])


def choose(q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int | None = None) -> str:
    """The name of the backend that `attend` uses for these arguments. value_dim: size of a value; None is K."""
    able = [name for name in BACKENDS if BACKENDS[name].unsupported(q_BSHK, facts, context, value_dim) is None]
    if context.backend == "auto":
        return next(name for name in _preference(q_BSHK, facts, context) if name in able)
    if context.backend not in BACKENDS:
        raise ConfigError(f"attention backend '{context.backend}' is unknown.{nearest(context.backend, BACKENDS)}")
    reason = BACKENDS[context.backend].unsupported(q_BSHK, facts, context, value_dim)
    if reason is not None:
        raise ConfigError(
            f"attention backend '{context.backend}' cannot be used here: {reason}. Able: {', '.join(able)}"
        )
    return context.backend


def tables(
    facts: AttentionFacts, head_dims: tuple[int, int], dtype: torch.dtype, context: AttentionContext
) -> dict[str, tuple[Tensor, ...]]:
    """What layers of these facts share of a context, by key; nothing where the context has it, or no backend wants it.

    For flex, the chunks to visit; where keys of other ranks are gathered, where those stand. They are made here,
    outside of the layers: once for all of them, and as inputs of a compiled layer, whose backward reads wild addresses
    where it has to compute them again (torch 2.11 on CUDA).
    head_dims: of a key and of a value. dtype: of the queries.
    """
    found: dict[str, tuple[Tensor, ...]] = {}
    device = context.positions_BS.device

    def queries(context: AttentionContext) -> Tensor:
        return torch.empty((), dtype=dtype, device=device).expand(*context.positions_BS.shape, 1, head_dims[0])

    if context.parts is not None:
        local, found = context_parallel.shared(queries(context), facts, context, head_dims[1])
        if local is None:
            return found
        context = local
    unwanted = context.cache is not None or device.type != "cuda" or context.backend not in ("auto", "flex")
    if unwanted or flex.key(facts) in context.tables:
        return found
    if choose(queries(context), facts, context, head_dims[1]) != "flex":
        return found
    return found | {flex.key(facts): flex.tables(facts, context)}


def _preference(q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext) -> tuple[str, ...]:
    """Fastest first. On CUDA a dense mask costs quadratic memory, so sdpa with one comes after flash and flex."""
    if q_BSHK.device.type == "cuda" and not sdpa.is_plain(q_BSHK.shape[1], facts, context):
        return "flash4", "flash", "flex", "sdpa", "reference"
    return "flash4", "sdpa", "flash", "flex", "reference"
