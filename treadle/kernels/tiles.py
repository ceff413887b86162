"""TileLang's compiler, as the kernels in it are compiled: for Hopper, for one size at first use; TileLang keeps them on
disk, in $TILELANG_CACHE_DIR. Its wheel brings no CUDA compiler: nvcc has to be there."""

from collections.abc import Callable
from functools import cache
from typing import Any

import tilelang
import torch

TARGET = {"kind": "cuda", "arch": "sm_90a"}
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@cache
def compiled(build: Callable[..., Any], *sizes: Any) -> Callable[..., None]:
    """The kernel that `build` describes, for such sizes. It takes tensors, those it writes too, and numbers."""
    options = {tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True}  # exp2 by the unit for it, as Triton has it too
    return tilelang.compile(build(*sizes), target=TARGET, execution_backend="tvm_ffi", pass_configs=options)  # type: ignore[no-any-return]
