"""SwiGLU in Mojo (`mojo/gates.mojo`): a thread computes 16 bytes of the result."""

from typing import Any

from torch import Tensor

from treadle.kernels import mojo
from treadle.kernels.launch import aligned

THREADS = 256


def unsupported(x: Tensor, *args: Any) -> str | None:
    if args[-1] != "silu":
        return f"it has silu only, not {args[-1]}"
    half = x.shape[-1] // (1 if isinstance(args[0], Tensor) else 2)  # of the backward, x is the gradient of the product
    if half % (16 // x.element_size()):
        return f"halves of {half} numbers are no multiple of 16 bytes"
    return mojo.misfit(x)


def gated_activation(x: Tensor, activation: str) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _run("swiglu", y, aligned(x), y)
    return y


def gated_activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    dy, dx = aligned(dy), x.new_empty(x.shape)
    _run("swiglu_backward", dy, dy, aligned(x), dx)
    return dx


def _run(operation: str, y: Tensor, *tensors: Tensor) -> None:
    vectors = y.numel() // mojo.vector(y)
    grid = (-(-vectors // THREADS),)
    mojo.call("gates", f"{operation}_{mojo.DTYPES[y.dtype]}", y, grid, *tensors, y.shape[-1], vectors)
