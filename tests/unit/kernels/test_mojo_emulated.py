"""The numbers of Mojo's GPU kernels without a GPU: what Mojo compiles, run by `emulator.py`, against float64."""

import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import Emulator

from treadle import kernels
from treadle.kernels import mojo, norms_mojo
from treadle.kernels.measure import ERROR_FLOOR, ERROR_RATIO, _furthest, _results, _wide

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mojo") is None, reason="needs mojo with MAX: make kernels-mojo says which packages"),
]
NAMES = ("rms_norm", "add_rms_norm", "rms_norm_backward", "gated_activation", "gated_activation_backward", "rope")
NAMES += ("rope_backward", "fused_linear")
LINEAR = tuple((epilogue, biased, 130, 96, 136) for epilogue in range(4) for biased in (0, 1))


class OnGPU(torch.Tensor):
    """On a CPU, but as the implementations see it on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By kernel."""
    folder = tmp_path_factory.mktemp("ptx")
    command = [mojo.compiler(), "run", "-I", str(mojo.FOLDER), str(mojo.FOLDER / "emit.mojo"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "MAX" in done.stderr:
        pytest.skip("needs MAX beside mojo: make kernels-mojo says which packages")
    assert done.returncode == 0, done.stderr[-2000:]
    texts = {path.name.split(".")[1]: path.read_text().split("\n", 1)[1] for path in Path(folder).glob("*.ptx")}
    assert texts.keys() == {name for known in mojo.manifest()["kernels"].values() for name in known}
    return texts


def error(name: str, args: Any, monkeypatch: pytest.MonkeyPatch, ptx: dict[str, str], seed: int | None) -> float:
    """Relative to what is allowed."""

    def call(source: str, kernel: str, x: Any, grid: Any, *arguments: Any) -> None:
        block = mojo.manifest()["kernels"][source][kernel]["block"]
        Emulator(ptx[kernel]).run(*grid, block, list(arguments), seed)

    monkeypatch.setattr(mojo, "call", call)
    monkeypatch.setattr(norms_mojo, "programs", lambda x, tiles, warps: min(tiles, 2))
    known = kernels.OPERATIONS[name]
    exact, narrow = (_results(known, known.reference, a) for a in ([_wide(x) for x in args], args))
    seen = [x.as_subclass(OnGPU) if isinstance(x, torch.Tensor) else x for x in args]
    found = [x.as_subclass(torch.Tensor) for x in _results(known, known.implementation("mojo"), seen)]
    return _furthest(found, exact) / (ERROR_RATIO * _furthest(narrow, exact) + ERROR_FLOOR)


def unsupported(name: str, args: Any) -> str | None:
    reason = kernels.operation._module(kernels.OPERATIONS[name].module, "mojo").unsupported(*args)
    return None if reason == "its matrix product is for GPUs" else reason


@pytest.mark.timeout(290)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_numbers(name: str, dtype: torch.dtype, ptx: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    known, checked = kernels.OPERATIONS[name], 0
    if name == "fused_linear" and dtype == torch.float32:
        pytest.skip("it multiplies bf16 or fp16")
    for shape in LINEAR if name == "fused_linear" else known.checked:
        args = known.arguments(shape, dtype, "cpu")
        if unsupported(name, args) is None:
            assert error(name, args, monkeypatch, ptx, None) <= 1, shape
            checked += 1
    assert checked


RACED = [("rms_norm", (2, 4096)), ("rms_norm_backward", (3, 2048)), ("fused_linear", (3, 1, 130, 96, 40))]


@pytest.mark.timeout(290)
@pytest.mark.parametrize(("name", "shape"), RACED)
def test_warps_may_run_ahead(name: str, shape: Any, ptx: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order the numbers are right; and without a kernel's barriers they are not, so that this would show."""
    torch.manual_seed(0)
    args = kernels.OPERATIONS[name].arguments(shape, torch.bfloat16, "cpu")
    assert error(name, args, monkeypatch, ptx, seed=1) <= 1
    unguarded = {kernel: text.replace("bar.sync", "membar.cta //") for kernel, text in ptx.items()}
    assert not error(name, args, monkeypatch, unguarded, seed=1) <= 1


def test_reads_beyond_a_tensor_show(ptx: dict[str, str]) -> None:
    x, y = torch.ones(2, 64), torch.ones(2, 32)
    Emulator(ptx["swiglu_float32"]).run(1, 256, [x, y, 32, 16])
    torch.testing.assert_close(y, torch.full((2, 32), 1 / (1 + torch.tensor(-1.0).exp().item())))
    with pytest.raises(IndexError, match="16 bytes at"):
        Emulator(ptx["swiglu_float32"]).run(1, 256, [x, y, 32, 17])
