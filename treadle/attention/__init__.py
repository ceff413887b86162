"""Attention: the context that a model is called with, and the backends behind it."""

from treadle.attention.cache import Cache, TokenCache
from treadle.attention.context import AttentionContext
from treadle.attention.context_parallel import gathered, joined
from treadle.attention.dispatch import BACKENDS, attend, choose, tables
from treadle.attention.facts import AttentionFacts
from treadle.attention.paged import PagedCache, Pages, Segment, StateCache, over_rows

__all__ = [
    "BACKENDS",
    "AttentionContext",
    "AttentionFacts",
    "Cache",
    "PagedCache",
    "Pages",
    "Segment",
    "StateCache",
    "TokenCache",
    "attend",
    "choose",
    "gathered",
    "joined",
    "over_rows",
    "tables",
]
