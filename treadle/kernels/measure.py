"""Checks of implementations against the definition in float64, and their times against what the hardware allows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.kernels.operation import Operation, Shape

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
