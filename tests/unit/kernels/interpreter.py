"""Triton's interpreter, put right: it runs kernels on the CPU, but rounds bf16 and fp8 wrong, and fails with numpy 2.4.

Run as a script it checks operations: python interpreter.py rms_norm ... . Tests call it in a process of its own, since
TRITON_INTERPRET has to be set before Triton is imported, and no kernel can be compiled in such a process.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot
_patch = interpreter._patch_lang_tensor


def _to_float32(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(numbers: np.ndarray) -> np.ndarray:
    """To nearest, ties to even. The interpreter itself cuts digits off."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _convert_float(x, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        return _to_bf16(x.view(np.float32)).reshape(x.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return _to_float32(x.view(np.uint16)).view(np.uint32).reshape(x.shape)
    if source == tl.float32 and target == tl.float8e4nv:  # as PyTorch rounds
        numbers = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(x.shape)
    return _convert(x, source, target, rounding)


def _create_dot(self, a, b, d, *rest):
    """A matrix product of bf16: the interpreter multiplies its bit patterns as integers."""
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _dot(self, a, b, d, *rest)
    x, y = (_to_float32(h.data) if h.dtype.scalar == tl.bfloat16 else h.data for h in (a, b))
    product = np.matmul(x, y, dtype=np.float32).astype(d.data.dtype) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._convert_float = _convert_float
interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.create_dot = _create_dot


def main(names: list[str]) -> None:
    from treadle import kernels
    from treadle.kernels.measure import check

    torch.manual_seed(0)
    for name in names:
        for finding in check(kernels.OPERATIONS[name], "triton", "cpu"):
            print(finding, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
