"""TileLang's kernels without a GPU: what their compiled form needs of the machine, and what they refuse. Their numbers
only a GPU can show: treadle kernels check --backend tilelang."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle import kernels
from treadle.kernels.operation import _module

NEEDED = {"tilelang": find_spec("tilelang"), "nvcc": shutil.which("nvcc")}
NEEDED["nvdisasm (pip install triton)"] = find_spec("triton") or shutil.which("nvdisasm")
MISSING = [name for name, found in NEEDED.items() if not found]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]
WRITTEN = ("rms_norm", "fused_linear", "causal_attention", "causal_attention_backward")

# A multiprocessor's registers, for two groups of 128 threads that multiply and one that loads; its shared memory.
REGISTERS, SHARED = 65536 // 384, 227 * 1024


@pytest.mark.timeout(290)
@pytest.mark.parametrize("name", WRITTEN)
def test_compiled_for_hopper(name: str) -> None:
    """In a process of its own, which compiles each kernel anew."""
    command = [sys.executable, str(Path(__file__).parent / "offline_tilelang.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(compiled) >= len(kernels.OPERATIONS[name].timed) - 1  # two may be of one kernel
    for kernel in compiled:
        assert kernel["spills"] == kernel["stack"] == 0, kernel
        assert kernel["reg"] <= REGISTERS, kernel
        assert kernel["shared"] <= SHARED, kernel
        if name == "rms_norm" or kernel["kernel"] == "rows":
            assert kernel["wide_loads"] > 0, kernel
        else:
            assert kernel["wgmma"] > 0, kernel
            assert kernel["tma_loads"] > 0, kernel


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("rms_norm", {0: torch.zeros(2, 128, dtype=torch.float64)}, "computes in float32"),
        ("rms_norm", {0: torch.zeros(2, 32768)}, "more than 16384"),
        ("rms_norm", {0: torch.zeros(2, 300)}, "cannot be dealt evenly"),
        ("fused_linear", {}, "bf16 or fp16, not torch.float32"),
        ("fused_linear", {0: torch.zeros(2, 12).bfloat16(), 1: torch.zeros(16, 12).bfloat16()}, "12 inputs"),
        ("fused_linear", {0: torch.zeros(2, 8).half(), 1: torch.zeros(16, 8).half(), 3: "swiglu"}, "no bias"),
        ("causal_attention", {}, "bf16 or fp16"),
        ("causal_attention", {0: torch.zeros(1, 100, 2, 64).half()}, "multiples of 128"),
        ("causal_attention_backward", {0: torch.zeros(1, 128, 2, 80).half()}, "head dims are 64 and 128"),
    ],
)
def test_what_it_cannot_compute(name: str, change: dict[int, Any], reason: str) -> None:
    known = kernels.OPERATIONS[name]
    args = list(known.arguments(known.checked[0], torch.float32, "cpu"))
    for position, value in change.items():
        args[position] = value
    assert reason in str(_module(known.module, "tilelang").unsupported(*args))
