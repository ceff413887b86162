"""Triton's kernels without a GPU: their numbers in the interpreter, what their compiled form needs of the machine."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from treadle import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install 'treadle[triton]'"),
]
HERE = Path(__file__).parent
WRITTEN = sorted(n for n, o in kernels.OPERATIONS.items() if find_spec("triton") and o.unusable("triton") is None)

# What two programs of 256 threads on each multiprocessor leave to a thread, and to a program of shared memory.
REGISTERS, SHARED = 128, 113 * 1024
# Tiles that are multiplied hold more: at most what one program leaves, and what is spilled is so outside of the loop.
MULTIPLYING = {"paged_attention"}
ALL_REGISTERS, ALL_SHARED = 65536, 227 * 1024


def run(script: str, *names: str) -> list[str]:
    """In a process of its own: what stands in for the GPU there would be in the way of everything else here."""
    command = [sys.executable, str(HERE / script), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.timeout(290)
def test_numbers_in_the_interpreter() -> None:
    findings = run("interpreter.py", *WRITTEN)
    assert {finding.split()[1] for finding in findings} == set(WRITTEN)
    assert [finding for finding in findings if not finding.startswith("ok ")] == []


@pytest.mark.timeout(290)
@pytest.mark.parametrize("what", ["numbers", "invariance"])
def test_attention_to_pages(what: str) -> None:
    findings = run("paged_cases.py", what)
    assert len(findings) > 20
    assert [finding for finding in findings if not finding.startswith("ok ")] == []


@pytest.mark.timeout(290)
def test_compiled_for_hopper() -> None:
    compiled = [json.loads(line) for line in run("offline.py", *WRITTEN)]
    assert {kernel["operation"] for kernel in compiled} == set(WRITTEN)
    for kernel in compiled:
        if kernel["operation"] in MULTIPLYING and kernel["products"]:
            assert kernel["inner_spills"] == 0, kernel
            assert kernel["reg"] * 32 * kernel["warps"] <= ALL_REGISTERS, kernel
            assert kernel["shared"] <= ALL_SHARED, kernel
        else:
            assert kernel["spills"] == kernel["stack"] == 0, kernel
            assert kernel["reg"] <= REGISTERS, kernel
            assert kernel["shared"] <= SHARED, kernel
        assert kernel["wide_loads"] > 0, kernel
        assert kernel["narrow_loads"] <= 1, kernel  # the logit of the one token that is asked for
