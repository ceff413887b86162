"""Kernels in Mojo: for Hopper GPUs they come compiled, for CPUs they are compiled where Mojo is installed.

`manifest.json` says of each compiled kernel what it takes and how it is launched; `make kernels-mojo` writes it. Those
for CPUs (`cpu.mojo`) take the same arguments, after the dtype's number.
"""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.errors import ConfigError
from treadle.kernels import cubin, tables

FOLDER = Path(__file__).parent
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@cache
def manifest() -> dict[str, Any]:
    return json.loads((FOLDER / "manifest.json").read_text())  # type: ignore[no-any-return]


def call(source: str, kernel: str, x: Tensor, grid: Sequence[int], *args: Any) -> None:
    """Run a kernel of `<source>.mojo` on the device of x. args: as the manifest says; tensors, None and numbers."""
    about = manifest()["kernels"][source][kernel]
    if x.is_cuda:
        return cubin.launch(FOLDER / f"{source}.cubin", kernel, about["arguments"], grid, about["block"], args)
    dtype = ctypes.c_int32(list(DTYPES).index(x.dtype))
    getattr(_native(), about["operation"])(dtype, *cubin.values(about["arguments"], args))


def vector(x: Tensor) -> int:
    """Numbers of 16 bytes: what a thread loads at once."""
    return 16 // x.element_size()


def misfit(*tensors: Tensor) -> str | None:
    """Why the kernels cannot read such tensors, whatever they compute."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return "it computes in float32"
        if x.shape[-1] % vector(x):
            return f"rows of {x.shape[-1]} numbers are no multiple of 16 bytes"
    return None


def compiler() -> str:
    """The command `mojo`: of this Python's environment, or on the PATH."""
    return shutil.which("mojo", path=sysconfig.get_path("scripts")) or shutil.which("mojo") or "mojo"


@cache
def _native() -> ctypes.CDLL:
    """The CPU versions, compiled at first use into the user's cache."""
    code = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.mojo")))
    library = tables.user_table("cpu").with_name(f"mojo-{hashlib.sha256(code).hexdigest()[:16]}.so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        beside = library.with_suffix(f".{os.getpid()}.so")
        build = [compiler(), "build", "--emit", "shared-lib", "-o", str(beside), str(FOLDER / "cpu.mojo")]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        if not beside.exists():
            raise ConfigError(f"kernels: mojo could not compile {FOLDER / 'cpu.mojo'}:\n{done.stderr[-2000:]}")
        beside.replace(library)  # at once: another process may be about the same
    return ctypes.CDLL(str(library))
