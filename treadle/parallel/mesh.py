"""The processes of a run, and how they are arranged: one object that every step is handed.

A single process has a mesh too, without any process group: sums are what is summed, and nobody has to ask how many
there are. Dimensions, from the slowest link to the fastest: pipeline, replicate, shard, context, tensor.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from treadle.errors import ConfigError, TreadleError
from treadle.parallel.config import Layout

T = TypeVar("T")

# Warns, of every norm and gathering of a tensor that is cut in two directions, that this takes two steps.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

DIMENSIONS = ("pipeline", "replicate", "shard", "context", "tensor")
PATIENCE = timedelta(days=7)  # preparing data may take as long as it likes
MARGIN = 300.0  # seconds that a collective waits beyond `parallel.timeout`: the stacks are to be written first


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is, as torchrun says it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def here(cls) -> "World":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))


@dataclass(frozen=True)
class Mesh:
    """Made by `open_mesh`; `Mesh()` is a single process on the CPU.

    fsdp: what `fully_shard` takes, (replicate, shard x context) or (shard x context); None for a single process.
    batch: everything that a batch is cut over, (replicate x shard x context). pipeline, context, tensor: submeshes,
    None where the size is one. expert: the processes that experts are dealt to, neighbours within shard x context;
    None without. expert_tensor: (expert, tensor), None where either is. expert_fsdp: what `fully_shard` takes for
    experts then, `fsdp` less `expert`. background: the group of saves that go on beside training. patient: that of
    waits.
    """

    world: World = World()
    layout: Layout = field(default_factory=Layout)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fsdp: DeviceMesh | None = None
    batch: DeviceMesh | None = None
    pipeline: DeviceMesh | None = None
    context: DeviceMesh | None = None
    tensor: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    expert_tensor: DeviceMesh | None = None
    expert_fsdp: DeviceMesh | None = None
    background: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, prints and logs."""
        return self.world.rank == 0

    @property
    def distributed(self) -> bool:
        return self.batch is not None

    @property
    def data_size(self) -> int:
        """Ranks that read different rows of a batch."""
        return self.layout.data

    @property
    def data_rank(self) -> int:
        """Which of them this is."""
        return self.rank // (self.layout.context * self.layout.tensor) % self.layout.data

    @property
    def expert_shards(self) -> int:
        """Processes that share the same experts among them, of one copy of the weights."""
        return self.layout.shard * self.layout.context // self.layout.expert

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over everything that a batch is cut over, in place."""
        if self.batch is not None:
            dist.all_reduce(tensor, group=self.batch.get_group())
        return tensor

    def sum_parts(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that hold parts of the same rows, in place."""
        if self.context is not None:
            dist.all_reduce(tensor, group=self.context.get_group())
        return tensor

    def sum_stages(self, tensor: Tensor) -> Tensor:
        """The sum over the stages of a pipeline, in place: of what most of them have nothing of."""
        if self.pipeline is not None:
            dist.all_reduce(tensor, group=self.pipeline.get_group())
        return tensor

    def sum_counts(self, *counts: int) -> list[int]:
        """The same of whole numbers that the host knows: the device is not waited for."""
        return [int(count) for count in self.sum(torch.tensor(counts, dtype=torch.int64)).tolist()]

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest over all processes, of numbers that the host knows."""
        found = torch.tensor(values, dtype=torch.float64)
        if self.distributed:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()  # type: ignore[no-any-return]

    def any(self, condition: bool) -> bool:
        """Whether it holds on any process: what all of them then act upon."""
        return self.maximum([float(condition)])[0] > 0

    def all(self, condition: bool) -> bool:
        return not self.any(not condition)

    def leaders(self, make: Callable[[], T]) -> T:
        """What the leader makes, on every process; it has to pickle. An error there is raised everywhere."""
        if not self.distributed:
            return make()
        made: list[Any] = [None, None]
        if self.leads:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        if made[1] is not None:
            if isinstance(made[1], TreadleError):
                made[1].everywhere = True
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    def same(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The leader's tensor (or that of rank `source`), in place: for what must not differ by the last bit."""
        if self.distributed:
            dist.broadcast(tensor, src=source)
        return tensor

    def union(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the stages of a pipeline have found, all of it on each of their processes; a name is one stage's own.

        values: on the compute device; whole numbers come back exactly up to 2^53.
        """
        if self.pipeline is None:
            return values
        group = self.pipeline.get_group()
        stages: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(stages, {name: (value.shape, value.dtype) for name, value in values.items()}, group)
        facts = {name: fact for stage in stages for name, fact in stage.items()}
        missing = torch.zeros((), dtype=torch.float64, device=self.device)
        pieces = [
            values[name].double().flatten() if name in values else missing.expand(shape.numel())
            for name, (shape, _) in facts.items()
        ]
        if not pieces:
            return {}
        both = torch.cat(pieces)
        dist.all_reduce(both, group=group)
        parts = both.split([shape.numel() for shape, _ in facts.values()])
        return {n: part.view(shape).to(kind) for part, (n, (shape, kind)) in zip(parts, facts.items(), strict=True)}

    def wait(self) -> None:
        """Until all processes are here."""
        if self.distributed:
            dist.barrier(group=self.patient)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The leader goes first, then the first process of every other node, then all: who comes later finds what was
        made. The others wait for as long as it takes; an error before all are through must end the process.
        """
        mine = 0 if self.leads else 1 if self.world.local_rank == 0 else 2
        for turn in range(3):
            if turn == mine:
                yield
            self.wait()


def find_device(name: str, world: World | None = None) -> torch.device:
    """`auto` is the GPU if there is one; of several processes each has its own.

    Raises ConfigError for cuda without a GPU, for no device at all, and for too few of them.
    """
    world = world or World()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: '{name}', but PyTorch sees no GPU here; use device=cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: '{name}'; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and world.size > 1:
        if device.index is not None:
            raise ConfigError(f"device: '{name}', but each of {world.size} processes has its own GPU; use device=cuda")
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{world.local_size} processes on this machine, but PyTorch sees {torch.cuda.device_count()} GPUs; "
                "start as many processes as GPUs, or use device=cpu"
            )
        device = torch.device("cuda", world.local_rank)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and generators mean the current device
    return device


@contextmanager
def open_mesh(layout: Layout, device: torch.device, *, timeout: float = 1800.0) -> Iterator[Mesh]:
    """The mesh of this run, and its process groups for as long as the block lasts. layout: checked before.

    After an error the groups are left as they are: the other processes may be inside a collective, and the end of
    this process is what tells them.
    """
    world = World.here()
    if world.size == 1:
        yield Mesh(device=device)
        return
    # Whole numbers and checkpoints travel through host memory, also beside GPUs.
    if layout.tensor > 1:  # each whole tensor would be told to be gathered on one dimension of the mesh after the other
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout + MARGIN))
    yield make_mesh(world, layout, device)
    dist.destroy_process_group()


def make_mesh(world: World, layout: Layout, device: torch.device) -> Mesh:
    """The mesh over the process group that is open."""
    sizes = tuple(getattr(layout, name) for name in DIMENSIONS)
    root = init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS)
    shard = _flatten(root["shard", "context"], "shard_context") if layout.context > 1 else root["shard"]
    fsdp = shard if layout.replicate == 1 else _concatenate(root["replicate"], shard)
    experts = expert_tensor = expert_fsdp = None
    if layout.expert > 1:
        dealt = _unflatten(shard, {"expert_shard": shard.size() // layout.expert, "expert": layout.expert})
        experts, expert_fsdp = dealt["expert"], dealt["expert_shard"]
        if layout.replicate > 1:
            expert_fsdp = _concatenate(root["replicate"], expert_fsdp)
        expert_tensor = _concatenate(experts, root["tensor"]) if layout.tensor > 1 else None
    single = {name: root[name] if getattr(layout, name) > 1 else None for name in ("pipeline", "context", "tensor")}
    return Mesh(
        world,
        layout,
        device,
        fsdp=fsdp,
        batch=_flatten(root["replicate", "shard", "context"], "batch"),
        expert=experts,
        expert_tensor=expert_tensor,
        expert_fsdp=expert_fsdp,
        background=dist.new_group(backend="gloo"),
        patient=dist.new_group(backend="gloo", timeout=PATIENCE),
        **single,
    )


def _flatten(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Several dimensions as one. Private in PyTorch; slicing the root by the new name is deprecated, so keep this."""
    return mesh._flatten(name)


def _unflatten(mesh: DeviceMesh, sizes: dict[str, int]) -> DeviceMesh:
    """One dimension as several. Private in PyTorch."""
    return mesh._unflatten(0, tuple(sizes.values()), tuple(sizes))


def _concatenate(first: DeviceMesh, second: DeviceMesh) -> DeviceMesh:
    """Two submeshes of one root as a mesh of both their dimensions. Private in PyTorch."""
    return DeviceMesh._concatenate([first, second])
