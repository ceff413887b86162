"""Norms in Mojo (`mojo/norms.mojo`): of several compiled sizes, the one that has the fewest threads idle."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from treadle.kernels import mojo
from treadle.kernels.launch import aligned, programs


def unsupported(x: Tensor, *args: Any) -> str | None:
    if (reason := mojo.misfit(x)) is not None:
        return reason
    backward = len([arg for arg in args if isinstance(arg, Tensor)]) > 2  # it has half the registers
    widest = _widest("rms_norm_backward" if backward else "rms_norm", mojo.DTYPES[x.dtype])
    return f"rows of more than {widest} numbers" if x.shape[-1] > widest else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _normed(x, None, weight, eps, offset)
    return y, rstd


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Any, Tensor]:
    return _normed(x, y, weight, eps, offset)


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Any, Tensor]:
    x_ND = _rows(x)
    rows, columns = x_ND.shape
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if residual is None else x.new_empty(x.shape)
    residual = None if residual is None else _rows(residual)
    weight, wide = _weight(weight, x)
    kernel, each, _ = _variant("rms_norm", mojo.DTYPES[x.dtype], columns)
    tensors = x_ND, residual, weight, y, total, rstd
    mojo.call("norms", kernel, x, (-(-rows // each),), *tensors, rows, columns, wide, eps, offset)
    return y, total, rstd


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    dy, x_ND, dsum = _rows(dy), _rows(x), None if dsum is None else _rows(dsum)
    rows, columns = x_ND.shape
    kernel, each, warps = _variant("rms_norm_backward", mojo.DTYPES[x.dtype], columns)
    count = programs(x, -(-rows // each), warps) if x.is_cuda else 1
    lines = count * each if x.is_cuda else 1
    dx, parts = x.new_empty(x.shape), x.new_empty(lines, columns, dtype=torch.float32)
    narrow, wide = _weight(weight, x)
    tensors = dy, dsum, x_ND, narrow, aligned(rstd), dx, parts
    mojo.call("norms", kernel, x, (count,), *tensors, rows, columns, wide, offset)
    return dx, parts.sum(0).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    return aligned(x).view(-1, x.shape[-1])


def _weight(weight: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """In float32 or in x's dtype, and whether it is in float32."""
    wide = weight.dtype == torch.float32
    return aligned(weight if wide else weight.to(x.dtype)), int(wide)


@cache
def _variant(operation: str, dtype: str, columns: int) -> tuple[str, int, int]:
    """The kernel for such rows, rows of a block, and its warps."""
    fit = {n: k for n, k in _compiled(operation, dtype).items() if k["columns"] >= columns}
    name = min(fit, key=lambda name: fit[name]["columns"])
    return name, fit[name]["rows"], fit[name]["block"] // 32


@cache
def _widest(operation: str, dtype: str) -> int:
    return max(kernel["columns"] for kernel in _compiled(operation, dtype).values())


def _compiled(operation: str, dtype: str) -> dict[str, Any]:
    kernels = mojo.manifest()["kernels"]["norms"]
    return {n: k for n, k in kernels.items() if (k["operation"], k["dtype"]) == (operation, dtype)}
