"""Numbers of 8 bits with a scale for each row, as fp8 matrix products take them."""

from typing import Any

import torch
from torch import Tensor

from treadle.kernels.operation import Floor, Operation, Shape, nbytes

LARGEST = 448.0  # of float8_e4m3fn


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of which each row is divided by a scale of its own, so that its largest becomes 448: x is near q * scale.

    x_..D -> q_..D in float8_e4m3fn, scale_.. in float32. For blocks of 128 (DeepSeek-V3, arXiv:2412.19437) take
    x.unflatten(-1, (-1, 128)). No gradient: what is multiplied with it forms its own.
    """
    if QUANTISE.worthwhile(x):
        return torch.ops.treadle.quantise_rows(x)  # type: ignore[no-any-return]
    return _quantise_rows(x)


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1).clamp(min=1e-12) / LARGEST
    return (wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return (torch.randn(*shape, dtype=dtype, device=device),)


QUANTISE = Operation(
    name="quantise_rows",
    schema="(Tensor x) -> (Tensor q, Tensor scale)",
    module=__name__,
    reference=_quantise_rows,
    fake=lambda x: (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)),
    ),
    floor=lambda x: Floor(nbytes(x) + x.numel() + 4 * x[..., 0].numel(), 3 * x.numel()),
    arguments=_arguments,
    checked=((3, 40), (2, 5, 128), (2, 4096)),
    timed=((16384, 4096), (16384, 32, 128)),
    dtypes=(torch.float32, torch.bfloat16),
)
