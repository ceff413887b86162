"""How a row of tokens is cut over the ranks of context parallelism. Static facts and index arithmetic alone.

A row of T tokens is cut into chunks of equal size; each rank holds one or two of them, S tokens. Laid end to end rank
by rank, the chunks are in rank order; as they stand in the row, in row order.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from treadle.errors import ConfigError

Method = Literal["gather", "ring", "ulysses"]
Order = Literal["zigzag", "contiguous"]


@dataclass(frozen=True)
class Parts:
    """Of a row: this rank's part and where the others are.

    method: how attention reaches other ranks' tokens. group: name of the process group.
    order: `contiguous` gives rank r the r-th piece. Causal attention has most to do for the last one, so `zigzag` cuts
        twice as many chunks and gives rank r of C the r-th from the start and the r-th from the end.
    """

    method: Method
    order: Order
    group: str
    rank: int
    size: int

    @property
    def each(self) -> int:
        """Chunks that a rank holds."""
        return 2 if self.order == "zigzag" else 1

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The numbers of a rank's chunks, as it holds them."""
        return (rank, 2 * self.size - 1 - rank) if self.order == "zigzag" else (rank,)

    def ranked(self) -> list[int]:
        """The numbers of all chunks in rank order."""
        return [chunk for rank in range(self.size) for chunk in self.chunks(rank)]

    def cut(self, x: Tensor, rank: int | None = None, dim: int = 1) -> Tensor:
        """The tokens that a rank holds, this one by default, of whole rows in row order."""
        pieces = self._pieces(x, dim)
        return torch.cat([pieces[chunk] for chunk in self.chunks(self.rank if rank is None else rank)], dim)

    def to_rank_order(self, x: Tensor, dim: int = 1) -> Tensor:
        """Whole rows, from row order."""
        if self.order == "contiguous":
            return x
        pieces = self._pieces(x, dim)
        return torch.cat([pieces[chunk] for chunk in self.ranked()], dim)

    def to_row_order(self, x: Tensor, dim: int = 1) -> Tensor:
        """Whole rows, from rank order."""
        if self.order == "contiguous":
            return x
        pieces, order = self._pieces(x, dim), self.ranked()
        return torch.cat([pieces[order.index(chunk)] for chunk in range(len(order))], dim)

    def _pieces(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        count = self.each * self.size
        if x.shape[dim] % count:
            raise ConfigError(f"rows of {x.shape[dim]} tokens cannot be cut into {count} chunks of equal size")
        return x.chunk(count, dim)
