"""Attention of many requests at once, whose keys and values lie in pages (Kwon et al. 2023, arXiv:2309.06180).

The new tokens of all requests are laid end to end as one row. A page holds a fixed number of successive tokens of one
request; a table says which page comes first, second, ... Pages that a window has left behind, and the filling of short
tables, are page 0, which belongs to nobody.

R requests, T new tokens of all of them, P pages of the longest request, N = R + 1, H heads, G key-value heads.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from treadle.attention.context import AttentionContext
from treadle.kernels import store_rows


@dataclass(frozen=True)
class Pages:
    """Where the tokens of a batch lie in the pages of layers of one kind.

    slots_T: int64, where each new token is stored: page * size of a page + its place there.
    tables_RP: int32, the pages of each request, in order.
    lengths_R: int32, the tokens of each request, new ones included.
    starts_N: int32, where each request's new tokens begin in the row; at the end T.
    longest: no request has more new tokens than this (static); 1 where each of them has one.
    """

    slots_T: Tensor
    tables_RP: Tensor
    lengths_R: Tensor
    starts_N: Tensor
    longest: int

    def rows(self, x_1TX: Tensor) -> Tensor:
        """What belongs to the new tokens, each request in a row of its own, filled up with zeros.  -> x_RSX"""
        request_T, place_T = self._places(x_1TX.shape[1])
        x_RSX = x_1TX.new_zeros(len(self.lengths_R), self.longest, *x_1TX.shape[2:])
        x_RSX[request_T, place_T] = x_1TX[0]
        return x_RSX

    def row(self, x_RSX: Tensor, tokens: int) -> Tensor:
        """The inverse of `rows`.  -> x_1TX"""
        return x_RSX[self._places(tokens)][None]

    def _places(self, tokens: int) -> tuple[Tensor, Tensor]:
        index_T = torch.arange(tokens, device=self.starts_N.device)
        request_T = torch.searchsorted(self.starts_N[1:], index_T, right=True)
        return request_T, index_T - self.starts_N[request_T]


class PagedCache:
    """A layer's part of the pages: buffers [pages, size of a page, ...], as `TokenCache` has them for rows."""

    in_pages = True

    def __init__(self, buffers: Sequence[Tensor], pages: Pages):
        self.buffers, self.pages = buffers, pages

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store the new tokens' tensors [1, T, ...]; return all pages, of all requests."""
        buffers, rows = [buffer.flatten(0, 1) for buffer in self.buffers], [tensor[0] for tensor in new]
        if len(new) == 2:
            a, b, x, y = (x.flatten(1) for x in (*buffers, *rows))
            store_rows(a, b, x, y, self.pages.slots_T)
        else:
            for buffer, tensor in zip(buffers, rows, strict=True):
                buffer.index_copy_(0, self.pages.slots_T, tensor.to(buffer.dtype))
        return tuple(self.buffers)

    def fresh(self, queries: int) -> bool:
        """Whether the queries' own tokens are all there are: not known."""
        return False


def by_rows(pages: Pages, context: AttentionContext) -> AttentionContext:
    """The context of the same tokens, each request in a row of its own."""
    return replace(context, positions_BS=pages.rows(context.positions_BS), documents_BS=None, tables={})


def gather(pages: Pages, buffer: Tensor) -> Tensor:
    """The tokens of each request one after the other: key j has position j.  [pages, size, ...] -> x_RTX"""
    return buffer[pages.tables_RP].flatten(1, 2)


@dataclass(frozen=True)
class Segment:
    """New tokens of requests that have equally many: `rows` requests, whose tokens are begin ... end of the row.

    slots_R: int64, where these requests have their state.
    """

    begin: int
    end: int
    rows: int
    slots_R: Tensor


class StateCache:
    """A layer's states of all requests, in slots: what a mixer keeps that reads tokens one after the other."""

    def __init__(self, state: Any, segments: Sequence[Segment]):
        """state: of `make_cache`, all of whose tensors have a slot for each request as their first dimension."""
        self.state, self.segments = state, segments


def over_rows(
    function: Callable[[Tensor, AttentionContext], Tensor], x_BSD: Tensor, context: AttentionContext
) -> Tensor:
    """function(x_BSD, context) where each row is one sequence: as it is, or for each segment of a batch of requests."""
    cache = context.cache
    if not isinstance(cache, StateCache):
        return function(x_BSD, context)
    done = []
    for part in cache.segments:

        def cut(x_1TX: Tensor, part: Segment = part) -> Tensor:
            return x_1TX[0, part.begin : part.end].unflatten(0, (part.rows, -1))

        state = copy.copy(cache.state)
        for name, tensor in vars(cache.state).items():
            setattr(state, name, tensor[part.slots_R])
        rows = replace(context, positions_BS=cut(context.positions_BS), documents_BS=None, cache=state, tables={})
        done.append(function(cut(x_BSD), rows).flatten(0, 1))
        for name, tensor in vars(cache.state).items():
            tensor[part.slots_R] = getattr(state, name)
    return torch.cat(done)[None]
