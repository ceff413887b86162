"""Compile the TileLang kernels of operations for a Hopper GPU, where there is none: python offline_tilelang.py rms_norm

An implementation is called with tensors that have no memory, and each kernel that it would launch is compiled, which
takes CUDA's nvcc. Prints a line of JSON for each: what it needs of the machine, by the tools that come with Triton.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from treadle import kernels
from treadle.kernels.mojo.build import tool
from treadle.kernels.operation import _module

CACHE = tempfile.mkdtemp()
os.environ["TILELANG_CACHE_DIR"] = CACHE  # read when TileLang is imported, which only its kernels do

COUNTED = {"wgmma": "HGMMA", "tma_loads": "UTMALDG", "spills": "LDL|STL", "wide_loads": r"LDG\.E\S*\.128"}


def resources(kernel, cubin: Path) -> dict[str, object]:
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True).stdout
    code = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True).stdout
    reg, stack, static = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED"))
    # Dynamic shared memory is the last number that the host's code hands over.
    numbers = re.findall(r"stack_ffi_any\)\[\d+\]\.v_int64\) = \(\(int64_t\)(\d+)\)", kernel.get_host_source())
    dynamic = int(numbers[-1]) if "buf_dyn_shmem" in kernel.get_kernel_source() else 0
    counts = {name: len(re.findall(rf"\b(?:{pattern})\b", code)) for name, pattern in COUNTED.items()}
    return {"reg": reg, "stack": stack, "shared": static + dynamic, **counts}


def main(names: list[str]) -> None:
    from treadle.kernels.tiles import compiled

    found = []

    def compile_only(build, *sizes):
        before = set(Path(CACHE).rglob("kernel.cubin"))
        kernel = compiled(build, *sizes)
        found.extend((build.__name__, kernel, cubin) for cubin in set(Path(CACHE).rglob("kernel.cubin")) - before)
        return lambda *args: None

    for name in names:
        operation = kernels.OPERATIONS[name]
        _module(operation.module, "tilelang").compiled = compile_only
        for shape in operation.timed:
            found.clear()
            operation.implementation("tilelang")(*operation.arguments(shape, torch.bfloat16, "meta"))
            for kernel_name, kernel, cubin in found:
                about = {"operation": name, "shape": shape, "kernel": kernel_name}
                print(json.dumps(about | resources(kernel, cubin)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
