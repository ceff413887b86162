"""How rows are dealt to the programs of a kernel: the same for all that hold whole rows in registers."""

from functools import cache

import torch
from torch import Tensor

PER_THREAD = 32  # numbers of a row that a thread holds: four loads of 16 bytes in bf16
TILE = 4096  # numbers of a program, where rows are shorter: enough loads under way to hide their latency


def rows_of(x: Tensor) -> Tensor:
    """x_..D as contiguous rows x_ND; a copy where it is not so in memory."""
    return x.contiguous().view(-1, x.shape[-1])


def aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on, where part of a flat buffer may not begin: x, or a copy of it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def power_of_two(x: int) -> int:
    """The smallest that is not less: what the sizes of Triton's blocks have to be."""
    return 1 << max(0, x - 1).bit_length()


def blocks(columns: int, tile: int = TILE, per_thread: int = PER_THREAD) -> tuple[int, int, int]:
    """Rows of a program, the numbers it holds of each (a power of two), and its warps."""
    block = power_of_two(columns)
    rows = max(1, tile // block)
    return rows, block, max(1, min(32, rows * block // (per_thread * 32)))


def programs(x: Tensor, tiles: int, warps: int) -> int:
    """As many programs as fill half of each multiprocessor, that go through many tiles; or one for each tile."""
    if not x.is_cuda:
        return min(tiles, 3)
    return min(tiles, _processors(x.device) * max(1, 32 // warps))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
