"""Compile the Triton kernels of operations for a Hopper GPU, where there is none: python offline.py rms_norm ...

An implementation is called with tensors that have no memory, and each kernel that it would launch is compiled. Prints a
line of JSON for each: what it needs of the machine, by the disassembler that comes with Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from treadle import kernels

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"

launched = []
_run = JITFunction.run


def run(self, *args, grid, warmup, **kwargs):
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    launched.append((self.fn.__name__, kernel))
    return kernel


def resources(kernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found = {name: int(re.search(rf"{name.upper()}:(\d+)", usage)[1]) for name in ("reg", "stack")}
    products = [match.start() for match in re.finditer(r"\b(?:HGMMA|HMMA)\b", code)]
    inner = code[products[0] : products[-1]] if products else code  # where most of the time goes
    wide, narrow = (len(re.findall(rf"LDG\.E{kind}\b", code)) for kind in (r"\S*\.128", r"\S*\.U?16"))
    return {**found, "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)), "shared": kernel.metadata.shared} | {
        "wide_loads": wide,
        "narrow_loads": narrow,
        "warps": kernel.metadata.num_warps,
        "products": len(products),
        "inner_spills": len(re.findall(r"\bSTL\b", inner)),
    }


def main(names: list[str]) -> None:
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    JITFunction.run = run
    for name in names:
        operation = kernels.OPERATIONS[name]
        for shape in operation.timed:
            launched.clear()
            operation.implementation("triton")(*operation.arguments(shape, torch.bfloat16, "meta"))
            for kernel_name, kernel in launched:
                about = {"operation": name, "shape": shape, "kernel": kernel_name}
                print(json.dumps(about | resources(kernel)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
