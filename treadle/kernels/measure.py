"""Checks of implementations against the definition in float64, and their times against what the hardware allows."""

import importlib.metadata
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from treadle.kernels import mojo, tables
from treadle.kernels.operation import BACKENDS, TORCH, Floor, Gradient, Operation, Shape, use

# An implementation may round in other places than the definition does, but not more often.
ERROR_RATIO = 2.0
ERROR_FLOOR = 1e-6  # where the definition is exact


@dataclass(frozen=True)
class Finding:
    """Relative errors against float64, of an implementation and of the definition in the same dtype."""

    operation: str
    backend: str
    dtype: str
    shape: Shape
    error: float
    reference_error: float

    @property
    def good(self) -> bool:
        return self.error <= ERROR_RATIO * self.reference_error + ERROR_FLOOR  # false for nan

    def __str__(self) -> str:
        what = f"{self.operation} {self.backend} {self.dtype} {'x'.join(map(str, self.shape))}"
        return (
            f"{'ok' if self.good else 'WRONG'} {what}: error {self.error:.1e}, definition's {self.reference_error:.1e}"
        )


def check(operation: Operation, backend: str, device: str) -> Iterator[Finding]:
    """Compare an implementation with the definition in float64, at every shape and dtype of the operation."""
    for dtype in operation.dtypes:
        for shape in operation.checked:
            args = operation.arguments(shape, dtype, device)
            if operation.unusable(backend, *args) is not None:
                continue
            exact = _results(operation, operation.reference, [_wide(arg) for arg in args])
            narrow = _results(operation, operation.reference, args)
            _poison(exact, device)
            found = _results(operation, operation.implementation(backend), args)
            error, reference_error = (_furthest(some, exact) for some in (found, narrow))
            name = str(dtype).removeprefix("torch.")
            yield Finding(operation.name, backend, name, shape, error, reference_error)


def _wide(arg: Any) -> Any:
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _results(operation: Operation, function: Any, args: Any) -> list[Tensor]:
    """What a function returns, and what it writes; its arguments stay as they are."""
    args = [arg.clone() if i in operation.written else arg for i, arg in enumerate(args)]
    found = function(*args)
    returned = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
    return [*returned, *(args[i] for i in operation.written)]


def _poison(results: list[Tensor], device: str) -> None:
    """Fill freed memory, so that what an implementation leaves unwritten shows."""
    for x in results:
        torch.full((x.numel(),), float("nan"), dtype=torch.float64, device=device)


def _furthest(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(_apart(a, b) for a, b in zip(found, exact, strict=True))


def _apart(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact result; infinite where the shapes differ."""
    if found.shape != exact.shape:
        return float("inf")
    exact = exact.double()
    scale = exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return float((found.double() - exact).norm() / scale)


ROTATED = 256e6  # bytes of arguments to go round among, so that none is found in a cache
BURST = 4e-3  # seconds of calls between two looks at the clock


def bench(operation: Operation, rates: Floor, *, quick: bool = False) -> Iterator[tables.Row]:
    """Time each implementation at the shapes and dtypes of training, on the GPU. rates: of `machine_rates`.

    Calls follow each other as they do in training, through PyTorch's dispatcher: where the GPU is done before the host
    has made the next call, it is the host that is measured. quick: once, so that everything has been compiled.
    """
    for dtype in operation.timed_dtypes:
        for shape in operation.timed:
            args = operation.arguments(shape, dtype, "cuda")
            floor = operation.floor(*args)
            sets = [args]
            while len(sets) * floor.bytes < ROTATED and len(sets) < 64 and not quick:
                sets.append(operation.arguments(shape, dtype, "cuda"))
            compiled = torch.compile(operation.plain or operation.reference, dynamic=False)
            calls = {"compiled": [_bound(compiled, args) for args in sets]}
            calls[TORCH] = [_eager(operation, args) for args in sets]
            found = {name: microseconds(call, quick) for name, call in calls.items()}
            operator = getattr(torch.ops.treadle, operation.name)
            for backend in BACKENDS:
                if operation.unusable(backend, *args) is None:
                    with use(**{operation.name: backend}):
                        found[backend] = microseconds([_bound(operator, args) for args in sets], quick)
            least = 1e6 * max(floor.bytes / rates.bytes, floor.flops / rates.flops)
            name, (rows, columns) = tables.dtype_name(args[0]), tables.size(args[0])
            yield tables.Row(operation.name, name, rows, columns, round(least, 2), found.pop("compiled"), found)


def machine_rates() -> Floor:
    """Bytes and FLOPs a second of this GPU: of a copy, read and written, and of a bf16 matmul."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy = microseconds([lambda: b.copy_(a)])
    matmul = microseconds([lambda: x @ x])
    return Floor(2 * a.numel() / copy * 1e6, 2 * 8192**3 / matmul * 1e6)


def table(rows: Iterable[tables.Row], findings: Iterable[Finding] = ()) -> Iterator[str]:
    """Lines of a table in Markdown: every backend that was timed, beside PyTorch, as it is and compiled.

    error: the largest against float64, of the checks in the same dtype. of floor: the share of the hardware's rate.
    """
    worst: dict[tuple[str, str, str], float] = {}
    for finding in findings:
        key = finding.operation, finding.dtype, finding.backend
        worst[key] = max(worst.get(key, 0.0), finding.error)
    yield "| operation | dtype | size | floor, us | backend | error | us | of floor | of compiled |"
    yield "|---" * 9 + "|"
    for row in rows:
        about = f"| {row.operation} | {row.dtype} | {row.rows} x {row.columns} | {row.floor:.1f} | "
        for name, time in {**row.microseconds, "compiled": row.compiled}.items():
            error = worst.get((row.operation, row.dtype, name))
            cells = "-" if error is None else f"{error:.1e}", f"{time:.1f}", f"{row.floor / time:.0%}"
            yield about + " | ".join((name, *cells, f"{time / row.compiled:.2f}")) + " |"


def _bound(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*args)


def _eager(operation: Operation, args: tuple[Any, ...]) -> Callable[[], Any]:
    """PyTorch without a compiler; of a backward, only what follows when the forward has been computed."""
    if not isinstance(operation.reference, Gradient):
        return _bound(operation.plain or operation.reference, args)
    function, inputs, grads = operation.reference.pieces(*args)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)


def microseconds(calls: list[Callable[[], Any]], quick: bool = False) -> float:
    """Of one call, the median of several bursts."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    if quick:
        return 1.0
    once = _burst(calls, 2 * len(calls))
    repeats = max(3, int(BURST * 1e6 / max(once, 1.0)))
    return round(statistics.median(_burst(calls, repeats) for _ in range(7)), 2)


def _burst(calls: list[Callable[[], Any]], repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for i in range(repeats):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / repeats


def machine() -> dict[str, str]:
    """What times were measured with."""
    versions = {name: importlib.metadata.version(name) for name in BACKENDS if name != "mojo" and find_spec(name)}
    versions["mojo"] = mojo.manifest()["versions"]["mojo"]  # that compiled the kernels, here or not
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **versions}
