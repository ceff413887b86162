"""Activations in host memory: what a layer keeps for the backward is copied out while the next one computes, and copied
back while the backward is at the layer behind it.

Whatever autograd would hold passes through here (`saved_tensors_hooks`): also what a compiled layer keeps, or the input
of one that is recomputed. PyTorch's own `save_on_cpu` does the same, and waits for each copy.

A storage is copied once, however many views of it are kept. Weights are left alone, and so is what is small.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

SMALL = 2**18  # bytes: copying less is not worth it


def offload_activations(layers: nn.ModuleDict, device: torch.device) -> None:
    """Let what these layers keep wait in host memory, pinned where the device is a GPU. The last one's stays.

    Comes after recomputation and compilation, which decide what is kept: the compiler must not see it. On a CPU the
    copies are made too, at once, so that it can be tried there.
    """
    copies = _Copies(device)
    for name, layer in layers.items():
        if layer._compiled_call_impl is None:
            layer.forward = _offloaded(layer.forward, layer, int(name), copies)
        else:
            layer._compiled_call_impl = _offloaded(layer._compiled_call_impl, layer, int(name), copies)


def _offloaded(call: Callable[..., Any], layer: nn.Module, number: int, copies: "_Copies") -> Callable[..., Any]:
    def offloaded(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args)
        before = copies.last()
        kept = _Kept(layer, number, before, copies)
        if before is not None:
            before.send()
        with saved_tensors_hooks(kept.pack, _View.unpack):
            found = call(*args)
        if before is not None:
            before.let_go()
        copies.last = weakref.ref(kept)
        return found

    return offloaded


class _Copies:
    """What the layers of a model share. last: what the latest of them to run keeps.

    Weakly, as everything here: it is the backward's, and its memory is free once that has passed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.last: Callable[[], _Kept | None] = lambda: None
        self.stream: torch.cuda.Stream | None = None

    def side(self) -> torch.cuda.Stream:
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        return self.stream


class _Kept:
    """What one run of one layer keeps: here, on the device, until it was sent and let go, and again once fetched.

    The storages' bytes, by the address that they had in the forward.
    """

    def __init__(self, layer: nn.Module, number: int, before: "_Kept | None", copies: _Copies):
        self.layer, self.number, self.copies = layer, number, copies
        # The backward comes to that one next. With many micro-batches the last to run may be another's.
        follows = before is not None and before.number == number - 1
        self.before: Callable[[], _Kept | None] = weakref.ref(before) if before and follows else lambda: None
        self.here: dict[int, Tensor] = {}
        self.host: dict[int, Tensor] = {}
        self.copied: torch.cuda.Event | None = None

    def pack(self, tensor: Tensor) -> Any:
        """What autograd is to hold in a tensor's place."""
        if type(tensor) is not Tensor:  # a parameter, or what a compiler traces with
            return tensor
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if storage.nbytes() < SMALL or tensor.device.type != self.copies.device.type or address in _weights(self.layer):
            return tensor
        if address not in self.here:
            self.here[address] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        return _View(self, address, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def send(self) -> None:
        if not self.host:
            self.host = self._copied(self.here, _on_host)

    def let_go(self) -> None:
        self._wait()  # this stream takes the memory up again
        self.here = {}

    def storage(self, address: int) -> torch.UntypedStorage:
        self.fetch()
        self._wait()
        if (before := self.before()) is not None:
            before.fetch()
        return self.here[address].untyped_storage()

    def fetch(self) -> None:
        if not self.here:
            self.here = self._copied(self.host, lambda x: torch.empty_like(x, device=self.copies.device))

    def _copied(self, tensors: dict[int, Tensor], room: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
        """Copies, in the room that is made for each."""
        found = {address: room(tensor) for address, tensor in tensors.items()}
        with self._beside():
            for address, tensor in tensors.items():
                found[address].copy_(tensor, non_blocking=True)
        return found

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the side stream, which begins when what this stream was told so far is done."""
        if self.copies.device.type != "cuda":
            yield
            return
        side = self.copies.side()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield
            self.copied = side.record_event()

    def _wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)


@dataclass(frozen=True)
class _View:
    """A tensor, as a place in a storage that is kept."""

    kept: _Kept
    address: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any  # a number

    def unpack(self: Any) -> Tensor:
        if not isinstance(self, _View):  # what `pack` has left alone
            return self
        storage = self.kept.storage(self.address)
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _weights(layer: nn.Module) -> set[int]:
    """Where a layer's parameters are now. Sharding of data puts them elsewhere for each run, as it comes to them."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in layer.parameters())
    return {parameter.untyped_storage().data_ptr() for parameter in parameters}
