"""The pieces of tensors that are spread over processes: where a piece lies, and how the whole comes together.

Everything here takes plain tensors as well, whose one piece is the whole. The only place that knows how a DTensor is
laid out.

A weight in which projections are stacked (`parts`: their row counts, whole) is cut part by part on the dimension
"tensor", so that each process has its own heads of queries, keys and values: its rows are not one run of the whole,
but one of each part. PyTorch knows nothing of it: to a DTensor the whole is the processes' rows end to end. For what
is done elementwise that makes no difference; whoever means a row of the whole has to say the parts here.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from treadle.nn.init import Piece
from treadle.nn.linear import GroupedLinear
from treadle.nn.store import save_model
from treadle.nn.transformer import Transformer
from treadle.parallel.mesh import Mesh

Parts = Sequence[int]
TENSOR, EXPERT = "tensor", "expert"  # the dimensions of a mesh that matrices are cut on, and experts dealt out


def parts_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parts of each parameter that is cut part by part, by name."""
    modules, found = dict(model.named_modules()), {}
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        parts, stacked = getattr(owner, "parts", {}), 1 if isinstance(owner, GroupedLinear) else 0
        if len(parts) > 1 and tensor_cut(parameter) == stacked:
            found[name] = tuple(parts.values())
    return found


def tensor_cut(tensor: Tensor) -> int | None:
    """The dimension in which a tensor is cut on the mesh's dimension "tensor"; None: it is not."""
    names = (tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()
    if isinstance(tensor, DTensor) and TENSOR in names:
        placement = tensor.placements[names.index(TENSOR)]
        return int(placement.dim) if isinstance(placement, Shard) else None
    return None


def pieces(tensor: Tensor, parts: Parts = ()) -> list[Piece]:
    """This process's part of a tensor, as views of what it holds, each one run of the whole in every dimension."""
    if not isinstance(tensor, DTensor):
        return [Piece.whole(tensor)]
    local = tensor.to_local().detach()
    offsets, shape = _place(tensor)
    assert tuple(local.shape) == shape, f"{tuple(local.shape)} held, {shape} expected"
    cut = tensor_cut(tensor)
    if not parts or cut is None:
        return [Piece(local, offsets, tuple(tensor.shape))]
    size, rank = _size_and_rank(tensor, TENSOR)
    first = offsets[cut] - rank * (tensor.shape[cut] // size)  # of what is here, in this process's stack
    last, here, there, found = first + shape[cut], 0, 0, []
    for part in parts:
        rows = part // size
        low, high = max(here, first), min(here + rows, last)
        if low < high:
            place = list(offsets)
            place[cut] = there + rank * rows + low - here
            found.append(Piece(local.narrow(cut, low - first, high - low), tuple(place), tuple(tensor.shape)))
        here, there = here + rows, there + part
    return found


def _place(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the rows that are here begin, and how many they are, in each dimension, without regard to parts.

    Matrices are cut and experts dealt out first, and what is left is shared out over the other dimensions: as
    `fully_shard` does it, which comes after both.
    """
    offsets, shape = [0] * tensor.ndim, list(tensor.shape)
    names = list(tensor.device_mesh.mesh_dim_names or ())
    order = sorted(range(len(names)), key=lambda dimension: names[dimension] not in (TENSOR, EXPERT))
    for dimension in order:
        placement = tensor.placements[dimension]
        if placement.is_replicate():
            continue
        cut, size = int(placement.dim), tensor.device_mesh.size(dimension)  # type: ignore[attr-defined]
        each = -(-shape[cut] // size)
        start = min(shape[cut], tensor.device_mesh.get_local_rank(dimension) * each)
        offsets[cut], shape[cut] = offsets[cut] + start, min(each, shape[cut] - start)
    return tuple(offsets), tuple(shape)


def _size_and_rank(tensor: DTensor, name: str) -> tuple[int, int]:
    dimension = (tensor.device_mesh.mesh_dim_names or ()).index(name)
    return tensor.device_mesh.size(dimension), tensor.device_mesh.get_local_rank(dimension)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, as a view without a gradient: for what is done elementwise."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def summed(placements: Sequence[Placement]) -> list[Placement]:
    """Those of a gradient, of which each process has a part of a sum where the tensor itself is on all."""
    return [Partial() if placement.is_replicate() else placement for placement in placements]


def spread_like(values: Tensor, tensor: Tensor, *, gradient: bool = False) -> Tensor:
    """The tensor of which `values` are what this process holds, where it is spread as `tensor` is, or its gradient."""
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values,
        tensor.device_mesh,
        summed(tensor.placements) if gradient else tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def cut_like(whole: Tensor, tensor: Tensor, parts: Parts = ()) -> Tensor:
    """The part of `whole` that this process holds of `tensor`, in the order in which it holds it."""
    found = []
    for here in pieces(tensor, parts):
        chosen = whole
        for dimension, (start, size) in enumerate(zip(here.offsets, here.values.shape, strict=True)):
            chosen = chosen.narrow(dimension, start if size else 0, size)
        found.append(chosen)
    return torch.cat(found, tensor_cut(tensor) or 0) if found else whole.new_empty(local(tensor).shape)


@torch.no_grad()
def copy_whole(tensor: Tensor, whole: Tensor, parts: Parts = ()) -> None:
    """Fill a tensor, of which this process may hold a part only, from all of its values."""
    local(tensor).copy_(cut_like(whole, tensor, parts))


def gather(tensor: Tensor, parts: Parts = ()) -> Tensor:
    """The whole tensor, on every process; all of them have to call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole, cut = tensor.full_tensor(), tensor_cut(tensor)
    if not parts or cut is None:
        return whole
    return _in_order(whole, cut, _size_and_rank(tensor, TENSOR)[0], parts)


def _in_order(stacks: Tensor, cut: int, size: int, parts: Parts) -> Tensor:
    """The rows of the whole, from the processes' stacks end to end."""
    each = stacks.unflatten(cut, (size, -1)).split([part // size for part in parts], dim=cut + 1)
    return torch.cat([stack.flatten(cut, cut + 1) for stack in each], cut)


def across(values: Tensor, tensor: Tensor, parts: Parts = ()) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Gathered on the mesh's dimension "tensor" alone; and what cuts such a tensor again.

    values: what this process holds of a tensor that is spread as `tensor` is, which is cut there.
    """
    assert isinstance(tensor, DTensor)
    cut, (size, rank) = tensor_cut(tensor), _size_and_rank(tensor, TENSOR)
    assert cut is not None
    group = tensor.device_mesh.get_group((tensor.device_mesh.mesh_dim_names or ()).index(TENSOR))
    everyone = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(everyone, values.contiguous(), group=group)
    stacked = list(parts) or [tensor.shape[cut]]

    def cut_again(whole: Tensor) -> Tensor:
        return torch.cat([part.chunk(size, cut)[rank] for part in whole.split(stacked, cut)], cut)

    return _in_order(torch.cat(everyone, cut), cut, size, stacked), cut_again


class Spread:
    """A tensor that is here in several pieces, as PyTorch's checkpoints want to be told: a checkpoint has the whole."""

    def __init__(self, here: list[Piece], shape: torch.Size, like: Tensor):
        self._values = {piece.offsets: piece.values for piece in here}
        self._shape, self._properties = shape, TensorProperties.create_from_tensor(like)

    def size(self) -> torch.Size:
        return self._shape

    def __create_write_items__(self, name: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=self._properties, size=self._shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=values.shape)
            for offsets, values in self._values.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._values[tuple(index.offset)]


class SavePlanner(DefaultSavePlanner):
    """PyTorch's, which looks for the pieces of tensors only.

    It is also the first to run in the thread that writes, whose GPU is the machine's first whoever started it: every
    process would take memory there.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict.get(index.fqn)
        return found.__get_tensor_shard__(index) if isinstance(found, Spread) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        flat, _ = flatten_state_dict(state_dict)
        super().set_up_planner(state_dict, metadata, is_coordinator)  # drops what it does not know
        self.state_dict |= {key: value for key, value in flat.items() if isinstance(value, Spread)}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict.get(index.fqn)
        return found.__get_tensor_shard__(index) if isinstance(found, Spread) else super().lookup_tensor(index)


def checkpointed(tensor: Tensor, parts: Parts = ()) -> Any:
    """What is handed to PyTorch's checkpoints in the place of a tensor, to be written, or filled in place."""
    if not parts or tensor_cut(tensor) is None:
        return tensor
    return Spread(pieces(tensor, parts), tensor.shape, local(tensor))


def whole_parameters(
    model: nn.Module, mesh: Mesh | None = None, *, only: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by name, whole, one at a time, of all stages of a pipeline; all processes go through it."""
    mesh = mesh or Mesh()
    here, parts = {name: p for name, p in model.named_parameters() if only(name)}, parts_of(model)
    if mesh.pipeline is None:
        yield from ((name, gather(parameter.detach(), parts.get(name, ()))) for name, parameter in here.items())
        return
    group = mesh.pipeline.get_group()
    stages: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(stages, {name: (p.shape, p.dtype) for name, p in here.items()}, group)
    seen: set[str] = set()
    for rank, stage in enumerate(stages):
        for name, (shape, dtype) in stage.items():
            if name not in seen:
                mine = rank == dist.get_rank(group)
                whole = gather(here[name].detach(), parts.get(name, ())) if mine else torch.empty(shape, dtype=dtype)
                whole = whole.to(mesh.device).contiguous()
                dist.broadcast(whole, src=dist.get_global_rank(group, rank), group=group)
                yield name, whole
                seen.add(name)


def save_whole(model: Transformer, folder: Path, mesh: Mesh) -> Path:
    """`save_model`, from all processes together: the leader writes. Returns the folder."""
    if mesh.leads:
        save_model(model, folder, parameters=whole_parameters(model, mesh))
    else:
        for _ in whole_parameters(model, mesh):
            pass
    mesh.wait()
    return folder


def mesh_of(tensor: Tensor) -> Any:
    """The device mesh that a tensor is spread over, None for a plain one: optimizers step one of each at a time."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
