"""Mojo's kernels without a GPU: what is shipped is of these sources, fits the machine, is launched as it wants to be;
and their CPU versions against float64, where Mojo is installed."""

import ctypes
import re
import subprocess
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from treadle import kernels
from treadle.errors import ConfigError
from treadle.kernels import cubin, mojo, operation
from treadle.kernels.measure import check
from treadle.kernels.mojo.build import arguments, digests, tool

SHIPPED = [(source, name) for source, known in mojo.manifest()["kernels"].items() for name in known]
WRITTEN = ("rms_norm", "add_rms_norm", "rms_norm_backward", "gated_activation", "gated_activation_backward", "rope")
WRITTEN += ("rope_backward", "fused_linear")
with_mojo = pytest.mark.skipif(find_spec("mojo") is None, reason="needs mojo: pip install 'treadle[mojo]'")


def test_cubins_are_of_these_sources() -> None:
    """If not: make kernels-mojo."""
    assert mojo.manifest()["sources"] == digests("*.mojo")
    assert mojo.manifest()["cubins"] == digests("*.cubin")


@pytest.mark.parametrize(("source", "name"), SHIPPED)
def test_kernels_fit_the_machine(source: str, name: str) -> None:
    about = mojo.manifest()["kernels"][source][name]
    assert about["arguments"] == arguments((mojo.FOLDER / f"{source}.mojo").read_text(), about["operation"])
    assert about["spills"] == 0
    assert about["registers"] <= 128
    assert about["registers"] * about["block"] <= 65536  # more cannot be launched
    assert about["shared"] <= 48 * 1024


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the disassembler of triton: pip install triton")
@pytest.mark.parametrize("source", sorted(mojo.manifest()["kernels"]))
def test_what_is_in_the_cubins(source: str) -> None:
    """By CUDA's own tools: the kernels of the manifest with its registers, that read 16 bytes at a time."""
    path = mojo.FOLDER / f"{source}.cubin"
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"Function (\w+):\s*REG:(\d+) STACK:0 ", usage))
    known = mojo.manifest()["kernels"][source]
    assert {name: int(registers) for name, registers in found.items()} == {n: k["registers"] for n, k in known.items()}
    code = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    kernels_code = dict(re.findall(r"\.section\s+\.text\.(\w+),(.*?)(?=\.section\s+\.text|\Z)", code, re.DOTALL))
    for name in known:
        wide = r"LDGSTS\.E\S*\.128" if source == "linear" else r"LDG\.E\S*\.128"
        assert re.search(wide, kernels_code[name]), name
        assert not re.search(r"LDG\.E\.U16|\bLDL\b|\bSTL\b", kernels_code[name]), name
        assert (source == "linear") == ("HMMA.16816.F32" in kernels_code[name]), name


class Driver:
    """Stands in for libcuda: notes what is called, and copies the arguments of launches while they live."""

    def __init__(self, codes: list[int]) -> None:
        self.codes, self.calls, self.arguments = codes, [], []
        self.types: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append(name)
            if name != "cuLaunchKernel":
                return 0
            for i, kind in enumerate(self.types):
                self.arguments.append(ctypes.cast(args[9][i], ctypes.POINTER(kind))[0])
            self.launched = args
            return self.codes.pop(0)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver([0])
    monkeypatch.setattr(cubin, "_driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    cubin._function.cache_clear()
    cubin._module.cache_clear()
    yield fake
    cubin._function.cache_clear()
    cubin._module.cache_clear()


def launch(**changed: Any) -> None:
    given = {"grid": (5, 6), "block": 64, "args": (torch.ones(2), None, 3, 1 << 40, 0.5)} | changed
    kinds = ("pointer", "pointer", "int", "long", "float")
    cubin.launch(mojo.FOLDER / "rope.cubin", "rope_float32", kinds, given["grid"], given["block"], given["args"])


def test_a_launch(driver: Driver) -> None:
    x = torch.ones(2)
    driver.types = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_int64, ctypes.c_float]
    launch(args=(x, None, 3, 1 << 40, 0.5))
    assert driver.arguments == [x.data_ptr(), 0, 3, 1 << 40, 0.5]
    assert driver.launched[1:8] == (5, 6, 1, 64, 1, 1, 0)
    assert driver.launched[8].value == 77  # PyTorch's stream
    launch(grid=(0,))  # of no rows
    assert driver.calls == ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"]


def test_a_thread_without_a_context_gets_pytorchs(driver: Driver) -> None:
    driver.codes = [cubin.INVALID_CONTEXT, 0]
    launch()
    assert driver.calls[-4:] == ["cuLaunchKernel", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuLaunchKernel"]


def test_launches_that_fail(driver: Driver) -> None:
    driver.codes = [701]
    with pytest.raises(RuntimeError, match="cuLaunchKernel: CUDA error 701"):
        launch()
    with pytest.raises(ValueError, match="5 arguments are wanted"):
        launch(args=(None, 3))


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "find_spec", lambda name: None)
    monkeypatch.setattr(operation, "on_hopper", lambda: True)
    assert operation.missing("mojo") is operation.missing("mojo", "cuda") is None
    assert "treadle[mojo]" in str(operation.missing("mojo", "cpu"))
    assert "treadle[tilelang]" in str(operation.missing("tilelang", "cuda"))
    monkeypatch.setattr(operation, "find_spec", lambda name: name)
    monkeypatch.setattr(operation, "on_hopper", lambda: False)
    assert operation.missing("mojo", "cpu") is None
    assert operation.missing("tilelang", "cpu") == "its tensors are on cpu"
    for backend in ("mojo", "tilelang"):
        assert "for Hopper GPUs" in str(operation.missing(backend, "cuda"))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("rms_norm", {0: torch.zeros(2, 8, dtype=torch.float64)}, "computes in float32"),
        ("rms_norm", {0: torch.zeros(2, 12, dtype=torch.bfloat16)}, "no multiple of 16 bytes"),
        ("rms_norm", {0: torch.zeros(1, 65536)}, "rows of more than 16384"),
        ("rms_norm_backward", {0: torch.zeros(1, 8192)}, "rows of more than 4096"),
        ("gated_activation", {1: "gelu"}, "silu only, not gelu"),
        ("gated_activation", {0: torch.zeros(2, 24, dtype=torch.bfloat16)}, "halves of 12 numbers"),
        ("gated_activation_backward", {2: "relu"}, "silu only, not relu"),
        ("rope", {8: "interleaved"}, "layout half only"),
        ("rope", {2: torch.ones(16)}, "no norm"),
        ("rope_backward", {4: torch.ones(16)}, "no norm"),
        ("rope", {4: torch.ones(2, 5, 1, 16).bfloat16()}, "tables are in float32"),
        ("rope", {4: torch.ones(2, 5, 1, 12)}, "6 pairs"),
        ("fused_linear", {}, "for GPUs"),
    ],
)
def test_what_it_cannot_compute(name: str, change: dict[int, Any], reason: str) -> None:
    known = kernels.OPERATIONS[name]
    shape = next(s for s in known.checked if not name.startswith("gated") or s[0] == 4)
    args = list(known.arguments(shape, torch.float32, "cpu"))
    for position, value in change.items():
        args[position] = value
    module = operation._module(known.module, "mojo")
    assert reason in str(module.unsupported(*args))


@with_mojo
@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_on_a_cpu(name: str) -> None:
    torch.manual_seed(0)
    findings = list(check(kernels.OPERATIONS[name], "mojo", "cpu"))
    assert [str(finding) for finding in findings if not finding.good] == []
    assert {finding.dtype for finding in findings} == (
        {"float32", "bfloat16", "float16"} if name != "fused_linear" else set()
    )


@with_mojo
def test_tensors_that_lie_badly_are_copied() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1 + 3 * 16)[1:].view(3, 16), torch.randn(17)[1:]
    assert x.data_ptr() % 16
    with kernels.use(rms_norm="mojo"):
        got = kernels.rms_norm(x, weight, 1e-5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    q, k = torch.randn(2, 5, 3, 20)[..., :16], torch.randn(2, 5, 1, 18)[..., 1:17]
    angle = torch.rand(1, 5, 1, 16)
    with kernels.use(rope="mojo"):
        turned = kernels.rope(q, k, angle.cos(), angle.sin())
    for got, given in zip(turned, (q, k), strict=True):
        torch.testing.assert_close(got, kernels.rope(given, k, angle.cos(), angle.sin())[0])


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = SimpleNamespace(stderr="no such thing")
    monkeypatch.setattr(mojo.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ConfigError, match=r"could not compile.*\n.*no such thing"):
        mojo._native.__wrapped__()
