"""Rows written to places of two buffers at once: how keys and values of new tokens come into their pages.

T rows, N places, X and Y numbers of a row.
"""

from typing import Any

import torch
from torch import Tensor

from treadle.kernels.operation import Floor, Operation, Shape, nbytes


def store_rows(a_NX: Tensor, b_NY: Tensor, x_TX: Tensor, y_TY: Tensor, places_T: Tensor) -> None:
    """a[place] = x, b[place] = y, in place. Of rows with the same place, any. places_T: int64"""
    args = a_NX, b_NY, x_TX, y_TY, places_T
    if STORE_ROWS.worthwhile(*args):
        torch.ops.treadle.store_rows(*args)
    else:
        _store_rows(*args)


def _store_rows(a: Tensor, b: Tensor, x: Tensor, y: Tensor, places: Tensor) -> None:
    a.index_copy_(0, places, x.to(a.dtype))
    b.index_copy_(0, places, y.to(b.dtype))


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Rows as they come: parts of one tensor."""
    T, X, Y = shape
    x, y, _ = torch.randn(T, X + Y + 16, dtype=dtype, device=device).split((X, Y, 16), dim=1)
    buffers = (torch.randn(2 * T + 3, size, dtype=dtype, device=device) for size in (X, Y))
    return *buffers, x, y, torch.arange(T, device=device) * 2 + 1


STORE_ROWS = Operation(
    name="store_rows",
    schema="(Tensor(a!) a, Tensor(b!) b, Tensor x, Tensor y, Tensor places) -> ()",
    module=__name__,
    reference=_store_rows,
    fake=lambda *_: None,
    floor=lambda a, b, x, y, places: Floor(2 * nbytes(x, y) + nbytes(places), 0),
    arguments=_arguments,
    checked=((1, 16, 16), (7, 40, 24), (5, 2048, 1024)),
    timed=((256, 1024, 1024), (8192, 1024, 1024)),
)
