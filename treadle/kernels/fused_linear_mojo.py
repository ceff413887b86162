"""A linear map with its epilogue in Mojo (`mojo/linear.mojo`): tensor cores as any GPU since Ampere has them (mma.sync,
without the instructions of Hopper alone)."""

from torch import Tensor

from treadle.kernels import mojo
from treadle.kernels.launch import aligned

EPILOGUES = ("none", "relu2", "gelu_tanh", "silu")  # in the kernel's numbers
TILE = 128


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str) -> str | None:
    if x.device.type != "cuda":
        return "its matrix product is for GPUs"
    name = mojo.DTYPES.get(x.dtype)
    if f"linear_{name}" not in mojo.manifest()["kernels"]["linear"] or weight.dtype != x.dtype:
        return f"it multiplies bf16 or fp16, not {x.dtype} and {weight.dtype}"
    if epilogue not in EPILOGUES:
        return f"it has no {epilogue}"
    if x.shape[-1] % 32 or weight.shape[0] % 2:
        return f"inputs are a multiple of 32 and outputs even, not {x.shape[-1]} and {weight.shape[0]}"
    return None


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str) -> Tensor:
    F, D = weight.shape
    y = x.new_empty(*x.shape[:-1], F)
    N = y.numel() // F
    grid = (-(-N // TILE) * -(-F // TILE),)
    tensors = aligned(x), aligned(weight), None if bias is None else aligned(bias.float()), y
    mojo.call("linear", f"linear_{mojo.DTYPES[x.dtype]}", x, grid, *tensors, N, F, D, EPILOGUES.index(epilogue))
    return y
