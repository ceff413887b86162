"""A meter of live memory: who allocates what, when, and for how long, on fake tensors or real ones.

A dispatch mode sees every operation below autograd, and takes down each new storage until it is dropped. From that log
the breakdown of any moment can be read off afterwards, when it is known what a block has become (a gradient, say).

The peak is kept by moment (`moment`: the forward of the first layer of its kind, the optimizer, ...), because memory at
a given moment grows linearly with the number of layers, and the largest of several moments does not.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, _sharding_prop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import treadle.kernels.grouped_linear  # noqa: F401  defines operators below

ROUND = 512  # bytes: what PyTorch's CUDA allocator rounds to
HOST = "host"  # the category of what does not lie on the device
COLLECTIVES = ("all_gather", "allgather", "reduce_scatter", "all_reduce", "allreduce", "all_to_all", "alltoall")
SENDS = ("isend", "send", "recv_")


@dataclass(slots=True)
class Block:
    """A piece of memory, from one tick of the meter's clock to another (None: it still lives)."""

    size: int
    category: str
    module: str
    born: int
    died: int | None = None


@dataclass
class Costs:
    """What operations cost beside memory. bytes: of the whole message, by process group and operation."""

    flops: float = 0.0
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: "Costs") -> None:
        self.flops += other.flops
        self.bytes.update(other.bytes)


class LiveMemory(TorchDispatchMode):
    """Measures while it is entered and `counting`. category, module: of what is allocated now."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.blocks: list[Block] = []
        self.current, self.clock = 0, 0
        self.moment: Any = "start"
        self.peaks: dict[Any, tuple[int, int]] = {}  # by moment: bytes, and the clock then
        self.costs = Costs()
        self.category, self.module = "activations", ""
        self._live: dict[int, tuple[Block, weakref.ref[Any]]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or compiled layers would run as if they were not

    def mark(self, tensors: Iterable[Any], category: str) -> None:
        """Say what these are, whether they are known already or not. What holds another tensor inside counts for it."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = local(tensor).untyped_storage()
                if storage._cdata in self._live:
                    block = self._live[storage._cdata][0]
                    block.category, block.module = category, self.module
                else:
                    with self.as_(category):
                        self._track(storage)

    @contextmanager
    def as_(self, category: str) -> Iterator[None]:
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def open(self, size: int, category: str | None = None) -> Block:
        """A block that no tensor stands for, until it is closed."""
        block = Block(rounded(size), category or self.category, self.module, self.clock)
        if self.counting:
            self.blocks.append(block)
            self._change(block.size, block.category)
        return block

    def close(self, block: Block) -> None:
        if self.counting and block.died is None:
            block.died = self.clock
            self._change(-block.size, block.category)

    def at(self, moment: Any) -> dict[tuple[str, str], int]:
        """Bytes by (category, module) at the peak of a moment."""
        when, found = self.peaks[moment][1], Counter[tuple[str, str]]()
        for block in self.blocks:
            if block.born < when and (block.died is None or block.died >= when):
                found[block.category, block.module] += block.size
        return dict(found)

    def begin(self) -> None:
        """Forget all but what is alive."""
        alive = [block for block, _ in self._live.values()]
        for block in alive:
            block.born = 0
        self.blocks, self.peaks, self.costs, self.clock = alive, {}, Costs(), 1
        self.current = sum(block.size for block in alive if block.category != HOST)

    def forget(self) -> None:
        """Everything: what is alive is of no interest any more."""
        self._live, self.blocks = {}, []

    def _track(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live:
            return
        block = Block(rounded(storage.nbytes()), self.category, self.module, self.clock)
        self.blocks.append(block)
        self._live[key] = block, weakref.ref(storage, partial(self._drop, key))
        self._change(block.size, block.category)

    def _drop(self, key: int, _: Any = None) -> None:
        block, _ = self._live.pop(key, (None, None))
        if block is None:
            return
        block.died = self.clock
        self._change(-block.size, block.category)

    def _resized(self, storage: Any) -> None:
        """FSDP frees and takes memory in this way; what it takes is gathered weights."""
        if (found := self._live.get(storage._cdata)) is None:
            return
        block, reference = found
        size = rounded(storage.nbytes())
        if size == block.size:
            return
        block.died = self.clock
        self._change(-block.size, block.category)
        block = Block(size, block.category, block.module, self.clock)
        self.blocks.append(block)
        self._live[storage._cdata] = block, reference
        self._change(size, block.category)

    def _change(self, by: int, category: str) -> None:
        self.clock += 1
        if category == HOST:
            return
        self.current += by
        if by > 0 and self.current > self.peaks.get(self.moment, (-1, 0))[0]:
            self.peaks[self.moment] = self.current, self.clock

    def __enter__(self) -> "LiveMemory":
        self._patches = [
            mock.patch.object(torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_)),
            # DTensor tries operations on tensors of global shape, to learn what comes out of them.
            self._wrapped(_sharding_prop.ShardingPropagator, "_propagate_tensor_meta_non_cached", self._muted),
            *(
                self._wrapped(FSDPParamGroup, name, lambda: self.as_("communication"))
                for name in ("unshard", "wait_for_unshard", "post_backward")
            ),
        ]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in reversed(self._patches):
            patch.stop()

    @contextmanager
    def _muted(self) -> Iterator[None]:
        before, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = before

    def _resizing(self, resize: Any) -> Any:
        def resize_(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if self.counting:
                self._resized(storage)
            return result

        return resize_

    @staticmethod
    def _wrapped(owner: Any, name: str, context: Callable[[], Any]) -> Any:
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with context():
                return function(*args, **kwargs)

        return mock.patch.object(owner, name, wrapper)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented
        if function is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return 1  # what a fake tensor holds: asked for in counts, which are replaced where they matter
        if function is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # its fake form would make a new tensor
        result = function(*args, **kwargs)
        if self.counting and torch._guards.TracingContext.try_get() is None:
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                    self._track(tensor.untyped_storage())
            if size := workspace(function, args):
                self.close(self.open(size, "workspace"))
            self.costs.add(costs_of(function, args, kwargs, result))
        return result


def workspace(function: Any, args: Any) -> int:
    """Bytes that an operation needs while it runs beside what it returns."""
    register = WORKSPACES.get(function)
    return 0 if register is None else register(*args)


WORKSPACES: dict[Any, Callable[..., int]] = {}  # by operation; `treadle.memory.stand_ins` fills it


def costs_of(function: Any, args: Any, kwargs: Any, result: Any) -> Costs:
    """Of one operation, whose tensors may be fake."""
    packet = getattr(function, "_overloadpacket", None)
    costs = Costs()
    if packet in flop_registry:
        costs.flops = flop_registry[packet](*args, **kwargs, out_val=result)
    elif packet in GROUPED:
        rows, weight = args[0], args[1]
        # Of the three, two multiply rows by weights, and one rows by rows.
        costs.flops = 2 * rows.numel() * (weight.shape[-2] if weight.ndim == 3 else weight.shape[-1])
        if packet is torch.ops.treadle.grouped_linear_input_grad:
            costs.flops = 2 * rows.numel() * weight.shape[-1]
    name = str(function)
    if "c10d" in name or "symm_mem" in name:
        operation = next((part for part in (*COLLECTIVES, *SENDS) if part in name), None)
        if operation is not None:
            tensors = [t for t in tree_iter((args, result)) if isinstance(t, Tensor)]
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            costs.bytes[_group(args), operation.replace("_", "")] = size
    return costs


GROUPED = {
    torch.ops.treadle.grouped_linear,
    torch.ops.treadle.grouped_linear_input_grad,
    torch.ops.treadle.grouped_linear_weight_grad,
}


def _group(args: Any) -> str:
    """The name of the process group among an operation's arguments."""
    for value in tree_iter(args):
        if isinstance(value, torch.ScriptObject):
            try:
                return str(torch.distributed.ProcessGroup.unbox(value).group_name)
            except RuntimeError:  # a reduction operation
                continue
    return next((value for value in args[::-1] if isinstance(value, str)), "")


def rounded(size: int) -> int:
    return -(-size // ROUND) * ROUND


def local(tensor: Any) -> Tensor:
    while isinstance(tensor, DTensor | AsyncCollectiveTensor):
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor.elem
    return tensor  # type: ignore[no-any-return]


def _is_fake(tensor: Any) -> bool:
    return isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)


def watch(meter: LiveMemory, module: nn.Module, name: str, moment: Any) -> None:
    """Attribute what a module allocates to `name`, in its forward and from the gradient of its output on.

    moment: of the forward, as (phase, ...); the backward's is the same with "backward" for the phase. None: it goes on.
    """

    def enter(*_: Any) -> None:
        before.append((meter.module, meter.moment))
        meter.module, meter.moment = name, moment or meter.moment

    def leave(_: Any, __: Any, output: Any) -> None:
        meter.module, _moment = before.pop()
        if moment is not None:
            meter.moment = ("forward", "between")
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(back)

    def back(_: Tensor) -> None:
        meter.module = name
        if moment is not None:
            meter.moment = ("backward", *moment[1:])

    before: list[Any] = []
    compiled: Any = module._compiled_call_impl
    if compiled is None:
        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave)
        return

    # A hook would be compiled with the module.
    def call(*args: Any, **kwargs: Any) -> Any:
        enter()
        output = compiled(*args, **kwargs)
        leave(None, None, output)
        return output

    module._compiled_call_impl = call  # type: ignore[assignment]
