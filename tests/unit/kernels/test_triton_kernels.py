"""Triton's kernels without a GPU: their numbers in the interpreter, what their compiled form needs of the machine."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install 'treadle[triton]'"),
]
HERE = Path(__file__).parent
WRITTEN = sorted(n for n, o in kernels.OPERATIONS.items() if find_spec("triton") and o.unusable("triton") is None)

# What two programs of 256 threads on each multiprocessor leave to a thread, and to a program of shared memory.
REGISTERS, SHARED = 128, 113 * 1024
# Tiles that are multiplied: in fewer, fuller threads. The largest is alone on its multiprocessor, and spills outside
# its loop.
MULTIPLYING, THREADS, ALL_SHARED = {"paged_attention"}, 256, 227 * 1024


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


def test_cross_entropy_in_the_interpreter() -> None:
    findings = run("cross_entropy_cases.py")
    assert len(findings) == 16
    assert [finding for finding in findings if not finding.startswith("ok ")] == []


@pytest.mark.timeout(290)
@pytest.mark.parametrize("what", ["numbers", "invariance", "engine"])
def test_attention_to_pages(what: str) -> None:
    findings = run("paged_cases.py", what)
    assert len(findings) >= {"numbers": 28, "invariance": 60, "engine": 2}[what]
    assert [finding for finding in findings if not finding.startswith("ok ")] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "it computes in float32"),
        ({"keys": torch.bfloat16}, "another dtype"),
        ({"R": 4097}, "more than 4096 requests"),
        ({"K": 320}, "heads of more than 256"),
        ({"K": 640, "V": 576}, "latents of more than 512"),
        ({"K": 640, "V": 512}, "shared keys of more than 64"),
        ({"K": 576, "V": 512}, None),
        ({}, None),
    ],
)
def test_attention_to_pages_that_is_refused(change: dict[str, Any], message: str | None) -> None:
    from treadle.kernels.paged_attention_triton import unsupported

    about: dict[str, Any] = {"dtype": torch.float32, "R": 2, "K": 64} | change
    K, V = about["K"], about.get("V", about["K"])
    shape = (about["R"], 1, 8, 4, 1, K, V, 8, 0, 0, 0, 0)
    q, keys, values, *rest = kernels.PAGED_ATTENTION.arguments(shape, about["dtype"], "meta")
    reason = unsupported(q, keys.to(about.get("keys", q.dtype)), values, *rest)
    assert (reason is None) if message is None else message in reason


@pytest.mark.timeout(290)
def test_compiled_for_hopper() -> None:
    compiled = [json.loads(line) for line in run("offline.py", *WRITTEN)]
    assert {kernel["operation"] for kernel in compiled} == set(WRITTEN)
    for kernel in compiled:
        multiplying = kernel["operation"] in MULTIPLYING and kernel["products"]
        alone = multiplying and kernel["shared"] > SHARED
        assert kernel["inner_spills"] == 0, kernel
        assert alone or kernel["spills"] == kernel["stack"] == 0, kernel
        threads = 32 * kernel["warps"] // (2 if alone else 1)
        assert kernel["reg"] <= (REGISTERS * THREADS // threads if multiplying else REGISTERS), kernel
        assert kernel["shared"] <= (ALL_SHARED if alone else SHARED), kernel
        assert kernel["wide_loads"] > 0, kernel
        assert kernel["narrow_loads"] <= 1, kernel  # the logit of the one token that is asked for
