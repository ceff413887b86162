"""What a kernel computes, and which implementation of it runs.

An `Operation` is one operator of PyTorch (`torch.ops.treadle.<name>`): its definition in plain PyTorch, the least that
it costs, and cases to try it on. An implementation is a function of the operation's name and arguments in the module
`<where it is defined>_<backend>`: `rms_norm` in `treadle/kernels/norms_triton.py`, say. Forward and backward are two
operations, and a backend may have one of them only.

Which one runs is read off a table of measured times (`treadle.kernels.tables`). A backend that was named is obeyed or
refused, and never swapped for another. Nothing is tried out or tuned while a model trains.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from treadle.config.base import nearest
from treadle.errors import ConfigError
from treadle.kernels import tables

TORCH = "torch"  # the definition itself, differentiated by PyTorch
BACKENDS = {  # in the order in which they are taken where nothing was measured; how to get them
    "triton": "pip install 'treadle[triton]' (PyTorch for CUDA brings it)",
    "tilelang": "pip install 'treadle[tilelang]', and CUDA's nvcc",
    "mojo": "pip install 'treadle[mojo]', for the CPU; a Hopper GPU needs nothing",
}
FOR_HOPPER = ("tilelang", "mojo")
OPERATIONS: dict[str, "Operation"] = {}

# Bytes of a call from which on, unmeasured, a kernel of ours is taken: what a GPU moves while the host launches one.
UNMEASURED = 128e6

Shape = tuple[int, ...]

_library = Library("treadle", "FRAGMENT")
_chosen: dict[Any, "Choice"] = {}


@dataclass(frozen=True)
class Choice:
    backend: str
    reason: str


@dataclass(frozen=True)
class Floor:
    """The least that a call can cost: bytes to and from memory, each once, and floating-point operations."""

    bytes: float
    flops: float


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of tensors, each moved once."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


@dataclass(frozen=True, eq=False)
class Operation:
    """One operator. It defines itself with PyTorch, and is called as `torch.ops.treadle.<name>`.

    schema: arguments and results as PyTorch writes them. Arguments that it changes are marked: "Tensor(a!) x".
    module: where it is defined (`__name__`).
    reference: the definition, in the dtype of its arguments or wider; in float64 it is what others are checked against.
    fake: what it returns, in shape, dtype and layout, without computing it.
    floor: bytes and FLOPs of a call.
    arguments: random arguments of a shape, for checks and timings: (shape, dtype, device) -> args.
    checked, timed: such shapes, small and odd ones to check (in dtypes), those of training to time (in timed_dtypes).
    plain: what takes its place where it is not worthwhile, if that is less than the definition (which also returns
        what the backward wants to know).
    unmeasured: bytes of a call from which on, where nothing was measured, a kernel of ours is taken.
    """

    name: str
    schema: str
    module: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    floor: Callable[..., Floor]
    arguments: Callable[[Shape, torch.dtype, str], tuple[Any, ...]]
    checked: tuple[Shape, ...]
    timed: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    timed_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    plain: Callable[..., Any] | None = None
    unmeasured: float = UNMEASURED

    def __post_init__(self) -> None:
        OPERATIONS[self.name] = self
        self._register(self.name, lambda *args: self.implementation(choose(self, *args).backend)(*args))

    def of(self, backend: str) -> Any:
        """A second operator, `<name>_<backend>`, that runs this backend whatever is chosen for the first."""
        self._register(f"{self.name}_{backend}", lambda *args: self.implementation(backend)(*args))
        return getattr(torch.ops.treadle, f"{self.name}_{backend}")

    def _register(self, name: str, run: Callable[..., Any]) -> None:
        _library.define(name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, _KEY)
        torch.library.register_fake(f"treadle::{name}", self.fake, lib=_library)

    def worthwhile(self, *args: Any) -> bool:
        """Whether to call the operator. If not, the definition takes its place, and PyTorch differentiates that.

        In compiled code the definition is better unless a backend was named: the compiler fuses it with what is around
        it, and does not keep what it can compute again.
        """
        if torch.compiler.is_compiling():
            return _named(self.name) not in (None, TORCH)
        return choose(self, *args).backend != TORCH

    def implementation(self, backend: str) -> Callable[..., Any]:
        if backend == TORCH:
            return lambda *args: _contiguous(self.reference(*args))
        return getattr(_module(self.module, backend), self.name)  # type: ignore[no-any-return]

    def unusable(self, backend: str, *args: Any) -> str | None:
        """Why a backend cannot compute this; None if it can. Without arguments: whether it could compute any."""
        if backend == TORCH:
            return None
        if backend not in BACKENDS:
            return f"no such backend.{nearest(backend, [TORCH, *BACKENDS])}"
        if find_spec(f"{self.module}_{backend}") is None:
            return "not written"
        if (reason := missing(backend, args[0].device.type if args else None)) is not None:
            return reason
        module = _module(self.module, backend)
        if not hasattr(module, self.name):
            return "not written"
        return module.unsupported(*args) if args else None  # type: ignore[no-any-return]

    @cached_property
    def written(self) -> tuple[int, ...]:
        """The positions of arguments that it changes in place."""
        arguments = getattr(torch.ops.treadle, self.name).default._schema.arguments
        return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _contiguous(results: Any) -> Any:
    """As `fake` promises it."""
    if results is None or isinstance(results, Tensor):
        return None if results is None else results.contiguous()
    return tuple(x.contiguous() for x in results)


_KEY = "CompositeExplicitAutograd"  # one implementation for all devices, and no gradient


class Gradient:
    """The definition of a backward: the forward's, differentiated by PyTorch.

    pieces: (arguments of the backward) -> a function, the tensors to differentiate it by, the gradients of its results.
    """

    def __init__(self, pieces: Callable[..., tuple[Callable[..., Any], tuple[Tensor, ...], Any]]):
        self.pieces = pieces

    def __call__(self, *args: Any) -> Any:
        function, inputs, grads = self.pieces(*args)
        if torch.compiler.is_compiling():  # the one form that a compiler can follow, and that fails inside an operator
            found = torch.func.vjp(function, *inputs)[1](grads)
        else:
            with _recording(), torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in inputs]
                found = torch.autograd.grad(function(*leaves), leaves, grads)
        return found[0] if len(found) == 1 else tuple(found)


def _recording() -> Any:
    """Autograd, switched on again where an operator is called below it (by a selective checkpoint, for one)."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView, keys.AutogradCPU, keys.AutogradCUDA):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def choose(operation: Operation, *args: Any) -> Choice:
    """Which implementation computes this call. Raises ConfigError where a named one cannot."""
    # Of numbers nothing hangs on floats, such as a learning rate, of which there is another one at each step.
    kinds = ((a.shape, a.dtype, a.device.type) if isinstance(a, Tensor) else a for a in args if type(a) is not float)
    key = (operation.name, torch.is_inference_mode_enabled(), *kinds)
    if key not in _chosen:
        _chosen[key] = _choose(operation, *args)
    return _chosen[key]


def explain(operation: Operation, *args: Any) -> dict[str, str]:
    """For each backend, whether it is used for such arguments, and why or why not."""
    choice = choose(operation, *args)
    verdicts = {name: operation.unusable(name, *args) or "able" for name in (TORCH, *BACKENDS)}
    return verdicts | {choice.backend: f"used: {choice.reason}"}


def _choose(operation: Operation, *args: Any) -> Choice:
    named = _named(operation.name)
    if named is not None:
        reason = operation.unusable(named, *args)
        if reason is not None:
            raise ConfigError(f"kernels: {operation.name}={named} cannot be used here: {reason}")
        return Choice(named, "named")
    if not args[0].is_cuda or not torch.cuda.is_available():
        return Choice(TORCH, f"its tensors are on {args[0].device.type}")
    able = [name for name in BACKENDS if operation.unusable(name, *args) is None]
    row = tables.nearest_row(operation.name, args[0])
    if row is None:
        able = [name for name in able if name not in FOR_HOPPER]  # only where they are known to be faster
        if torch.is_inference_mode_enabled():
            return Choice(able[0] if able else TORCH, "nothing was measured, and inference is short of launches")
        large = operation.floor(*args).bytes >= operation.unmeasured
        reason = f"nothing was measured, and the call is {'large' if large else 'small'}"
        return Choice(able[0] if able and large else TORCH, reason)
    fastest = min((name for name in row.microseconds if name in (TORCH, *able)), key=row.microseconds.__getitem__)
    return Choice(fastest, f"the fastest at {row.rows} x {row.columns}: {row.microseconds[fastest]:.1f} us")


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def missing(backend: str, device: str | None = None) -> str | None:
    """Why a backend does not run on a kind of device, or without one on none of this machine's; None if it does."""
    if device == "cuda" and backend in FOR_HOPPER and not on_hopper():
        return "its kernels are for Hopper GPUs (compute capability 9.0)"
    if backend == "mojo" and device != "cpu" and on_hopper():
        return None  # compiled, they come with the package
    if not find_spec(backend):
        return f"not installed: {BACKENDS[backend]}"
    if device in (None, "cuda") or (device == "cpu" and (backend == "mojo" or interpreted(backend))):
        return None
    return f"its tensors are on {device}"


def interpreted(backend: str) -> bool:
    """Whether a backend runs its kernels on a CPU, number by number."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _module(module: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{module}_{backend}")


# A dictionary of the process and no context variable: backwards run in threads of PyTorch's.
_names: dict[str, str] = {}


def _named(operation: str) -> str | None:
    return _names.get(operation) or _names.get("all")


@contextmanager
def use(**backends: str) -> Iterator[None]:
    """Name the backend of operations, for this process: `with use(rms_norm="triton", all="torch")` (all others)."""
    before = dict(_names)
    _set_names(before | backends)
    try:
        yield
    finally:
        _set_names(before)


def _set_names(names: dict[str, str]) -> None:
    for operation, backend in names.items():
        if operation not in (*OPERATIONS, "all"):
            raise ConfigError(f"kernels: no operation '{operation}'.{nearest(operation, [*OPERATIONS, 'all'])}")
        if backend not in (TORCH, *BACKENDS):
            raise ConfigError(f"kernels: {operation}={backend}: no such backend.{nearest(backend, [TORCH, *BACKENDS])}")
    _names.clear()
    _names.update(names)
    _chosen.clear()


def name_from_environment() -> None:
    """Read TREADLE_KERNELS, `rms_norm=torch,rope=triton`: what `use` does, for a whole process."""
    text = os.environ.get("TREADLE_KERNELS", "")
    _set_names(dict(_pair(entry) for entry in text.split(",") if entry.strip()))


def _pair(entry: str) -> tuple[str, str]:
    operation, equals, backend = entry.strip().partition("=")
    if not equals:
        raise ConfigError(f"TREADLE_KERNELS: '{entry}' is no OPERATION=BACKEND, such as rms_norm=torch or all=triton")
    return operation, backend
