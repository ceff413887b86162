"""Which implementation runs: by name, by measured times, or by default; and what is registered with PyTorch."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from treadle import kernels
from treadle.errors import ConfigError
from treadle.kernels import operation, tables
from treadle.kernels.measure import check


def doubled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@pytest.fixture(scope="module")
def toy() -> Iterator[kernels.Operation]:
    """An operation of our own: its definition here, its implementation in the module that `backend` fakes."""
    yield kernels.Operation(
        name="toy",
        schema="(Tensor x, float factor) -> Tensor",
        module="toys",
        reference=doubled,
        fake=lambda x, factor: torch.empty_like(x),
        floor=lambda x, factor: kernels.Floor(2 * x.numel() * x.element_size(), x.numel()),
        arguments=lambda shape, dtype, device: (torch.randn(*shape, dtype=dtype, device=device), 3.0),
        checked=((4, 5),),
        timed=((128, 128),),
    )
    del kernels.OPERATIONS["toy"]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of implementations in the name of Triton, that is there and may run on a CPU."""
    module: Any = ModuleType("toys_triton")
    module.toy = lambda x, factor: x * factor + x * 0
    module.unsupported = lambda x, factor: "too wide" if x.shape[-1] > 100 else None
    monkeypatch.setattr(operation, "find_spec", lambda name: name)
    monkeypatch.setattr(operation, "_module", lambda name, backend: module)
    monkeypatch.setattr(operation, "interpreted", lambda backend: backend == "triton")
    monkeypatch.setattr(operation, "on_hopper", lambda: False)
    monkeypatch.setattr(operation, "_chosen", {})
    return module


def test_definition_runs_on_a_cpu(toy: kernels.Operation) -> None:
    x = torch.randn(3, 4)
    assert kernels.choose(toy, x, 3.0).backend == "torch"
    assert torch.equal(torch.ops.treadle.toy(x, 3.0), 3 * x)


def test_named_backend_is_obeyed_or_refused(toy: kernels.Operation, backend: ModuleType) -> None:
    x = torch.randn(3, 4)
    with kernels.use(toy="triton"):
        assert kernels.choose(toy, x, 3.0).backend == "triton"
        backend.toy = lambda x, factor: x * 7  # so that it shows which one ran
        assert torch.equal(torch.ops.treadle.toy(x, 3.0), 7 * x)
        with pytest.raises(ConfigError, match="toy=triton cannot be used here: too wide"):
            torch.ops.treadle.toy(torch.randn(2, 101), 3.0)
    assert torch.equal(torch.ops.treadle.toy(x, 3.0), 3 * x)  # as before


def test_refused_where_it_cannot_run(toy: kernels.Operation) -> None:
    with kernels.use(rms_norm="triton"), pytest.raises(ConfigError, match="rms_norm=triton cannot be used here"):
        kernels.rms_norm(torch.randn(2, 8), torch.ones(8), 1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [({"rms_nrom": "triton"}, "Did you mean 'rms_norm'"), ({"rms_norm": "tritn"}, "Did you mean 'triton'")],
)
def test_misspelt_names(names: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message), kernels.use(**names):
        pass


def test_names_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernels.use():
        monkeypatch.setenv("TREADLE_KERNELS", "rms_norm=torch, all=torch")
        operation.name_from_environment()
        assert kernels.choose(kernels.OPERATIONS["rms_norm"], torch.ones(1, 8)).reason == "named"
        monkeypatch.setenv("TREADLE_KERNELS", "rms_norm")
        with pytest.raises(ConfigError, match="TREADLE_KERNELS: 'rms_norm' is no OPERATION=BACKEND"):
            operation.name_from_environment()


def row(rows: int, columns: int, **microseconds: float) -> tables.Row:
    return tables.Row("toy", "float32", rows, columns, 1.0, 5.0, microseconds)


class OnGPU(torch.Tensor):
    """A tensor that claims to be on a GPU, as far as the choice looks."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("shape", "chosen"), [((1000, 64), "triton"), ((3, 64), "torch"), ((1000, 101), "torch"), ((1, 32), "torch")]
)
def test_fastest_of_the_nearest_measurement(
    toy: kernels.Operation, backend: ModuleType, monkeypatch: pytest.MonkeyPatch, shape: Any, chosen: str
) -> None:
    measured = (row(1024, 64, torch=9.0, triton=2.0, mojo=1.0), row(4, 64, torch=2.0, triton=3.0))
    monkeypatch.setattr(operation, "find_spec", lambda name: None if "mojo" in name else name)
    monkeypatch.setattr(tables, "architecture", lambda: "sm_90")
    monkeypatch.setattr(tables, "load", lambda architecture: measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = torch.randn(*shape).as_subclass(OnGPU)
    assert kernels.choose(toy, x, 3.0).backend == chosen  # mojo is faster and not here
    assert kernels.explain(toy, x, 3.0)["mojo"] == "not written"
    assert kernels.explain(toy, x, 3.0)[chosen].startswith("used: the fastest at")


@pytest.mark.parametrize(("rows", "chosen"), [(4, "torch"), (1_000_000, "triton")])
def test_unmeasured_calls_go_by_their_size(
    toy: kernels.Operation, backend: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: int, chosen: str
) -> None:
    monkeypatch.setattr(tables, "architecture", lambda: "sm_90")
    monkeypatch.setattr(tables, "load", lambda architecture: ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = torch.empty(rows, 64).as_subclass(OnGPU)
    assert kernels.choose(toy, x, 3.0).backend == chosen
    monkeypatch.setattr(operation, "find_spec", lambda name: None if "triton" in name else name)
    operation._chosen.clear()
    assert operation.choose(toy, x, 3.0).backend == "torch"  # the others only by name, or by measurement


def test_operations_may_have_a_size_of_their_own(
    toy: kernels.Operation, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "architecture", lambda: "sm_90")
    monkeypatch.setattr(tables, "load", lambda architecture: ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(vars(toy), "unmeasured", 0)
    assert kernels.choose(toy, torch.empty(1, 64).as_subclass(OnGPU), 3.0).backend == "triton"


def test_shipped_table() -> None:
    """Every row is of an operation that exists, and no time is below what the hardware allows."""
    shipped = tables.read(tables.SHIPPED / "sm_90.json")
    assert shipped
    for measured in shipped:
        assert measured.operation in kernels.OPERATIONS
        assert min(measured.microseconds.values()) > 0.98 * measured.floor
        assert {"torch", "triton"} <= set(measured.microseconds)


def test_table_on_disk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tables.user_table("sm_00")
    other = tables.Row("other", "float32", 1, 1, 1.0, 1.0, {"torch": 1.0})
    tables.write(path, [row(1, 1, torch=1.0), other], {"device": "none"})
    tables.write(path, [row(2, 2, torch=2.0)], {"device": "none"})
    assert tables.load("sm_00") == (other, row(2, 2, torch=2.0))
    path.write_text("{")
    tables.load.cache_clear()
    with pytest.raises(ConfigError, match="delete it, and measure again"):
        tables.load("sm_00")


def test_check_finds_errors(toy: kernels.Operation, backend: ModuleType) -> None:
    assert all(finding.good for finding in check(toy, "triton", "cpu"))
    for wrong in (
        lambda x, factor: x * (factor + 1e-3),
        lambda x, factor: torch.empty_like(x),  # poisoned
        lambda x, factor: x[1:] * factor,
        lambda x, factor: (x.bfloat16() * factor).to(x.dtype),
    ):
        backend.toy = wrong
        assert not all(finding.good for finding in check(toy, "triton", "cpu"))


@pytest.mark.parametrize("name", sorted(kernels.OPERATIONS))
def test_registered_with_pytorch(name: str) -> None:
    """Schema, fake tensors and what is written, as PyTorch itself checks them."""
    known = kernels.OPERATIONS[name]
    for dtype in known.dtypes:
        args = known.arguments(known.checked[1], dtype, "cpu")
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.treadle, name).default, args, test_utils=utilities)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_operator_inside_compiled_code(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators, with the definition behind them: differentiated, compiled, recomputed, as PyTorch's own norm."""
    monkeypatch.setattr(kernels.Operation, "worthwhile", lambda *args: True)
    x, y = (torch.randn(4, 6, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, dtype=torch.float64, requires_grad=True)

    def ours(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed, total = kernels.add_rms_norm(x, y, weight, 1e-5, offset)
        return (normed * total).cos() + kernels.rms_norm(total, weight, 1e-5, offset)

    def theirs(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x + y, (32,), weight + offset, 1e-5)
        return (normed * (x + y)).cos() + normed

    expected = torch.autograd.grad(theirs(x, y, weight).sum(), (x, y, weight))
    recomputed = lambda *args: torch.utils.checkpoint.checkpoint(ours, *args, use_reentrant=False)  # noqa: E731
    for function in (ours, recomputed, torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")):
        got = function(x, y, weight)
        torch.testing.assert_close(got, theirs(x, y, weight))
        for a, b in zip(torch.autograd.grad(got.sum(), (x, y, weight)), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_definition_inside_compiled_code() -> None:
    """On a CPU nothing of ours stands between the compiler and PyTorch's operators."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph

    x, weight = torch.randn(4, 32), torch.ones(32)
    compiled = torch.compile(lambda x, w: kernels.rms_norm(x, w, 1e-5), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, weight), F.rms_norm(x, (32,), weight, 1e-5))
    assert len(graphs) == 1
    assert "treadle" not in graphs[0]
