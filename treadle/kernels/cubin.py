"""Launch kernels that were compiled before, from a cubin, on PyTorch's current stream: ctypes over the driver's API.

Nothing but the driver is needed. A launch may be captured in a CUDA graph: it allocates nothing and waits for nothing.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INVALID_CONTEXT = 201  # of a thread that has not used the GPU yet, such as one of autograd's
TYPES = {"pointer": ctypes.c_void_p, "int": ctypes.c_int32, "long": ctypes.c_int64, "float": ctypes.c_float}


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *args: Any) -> None:
    code = getattr(_driver(), name)(*args)
    if code == INVALID_CONTEXT:
        context = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), torch.cuda.current_device())  # PyTorch's own
        _call("cuCtxSetCurrent", context)
        code = getattr(_driver(), name)(*args)
    if code:
        text = ctypes.c_char_p(b"unknown error")
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: CUDA error {code}: {(text.value or b'').decode()}")


@cache
def _function(path: Path, kernel: str, shared: int, device: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    _call("cuModuleGetFunction", ctypes.byref(function), _module(path, device), kernel.encode())
    if shared > 48 * 1024:
        maximum = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call("cuFuncSetAttribute", function, maximum, shared)
    return function


@cache
def _module(path: Path, device: int) -> ctypes.c_void_p:
    torch.cuda.init()
    module = ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), path.read_bytes())
    return module


def values(types: Sequence[str], args: Sequence[Any]) -> list[Any]:
    """Arguments as C takes them. types: of TYPES; a pointer is a tensor's, or None."""
    if len(types) != len(args):
        raise ValueError(f"{len(types)} arguments are wanted ({', '.join(types)}), {len(args)} given")
    plain = (arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
    return [TYPES[kind](arg) for kind, arg in zip(types, plain, strict=True)]


def launch(
    path: Path, kernel: str, types: Sequence[str], grid: Sequence[int], block: int, args: Sequence[Any], shared: int = 0
) -> None:
    """Launch `kernel` of the cubin at `path`. Raises RuntimeError with the driver's message where that fails.

    grid: up to three numbers of blocks. block: threads. shared: bytes of dynamic shared memory.
    """
    if 0 in grid:
        return
    function = _function(path, kernel, shared, torch.cuda.current_device())
    held = values(types, args)
    addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    sizes = (*grid, 1, 1)[:3]
    _call("cuLaunchKernel", function, *sizes, block, 1, 1, shared, stream, addresses, None)
