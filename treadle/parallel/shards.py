"""The pieces of tensors that are spread over processes: where a piece lies, and how the whole comes together.

Everything here takes plain tensors as well, whose one piece is the whole. The only place that knows how a DTensor is
laid out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from treadle.nn.init import Piece
from treadle.nn.store import save_model
from treadle.nn.transformer import Transformer
from treadle.parallel.mesh import Mesh


def piece(tensor: Tensor) -> Piece:
    """This process's part of a tensor, as a view, with the index of its first element in the whole."""
    if not isinstance(tensor, DTensor):
        return Piece.whole(tensor)
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local().detach()
    assert tuple(local.shape) == tuple(shape), f"{tuple(local.shape)} held, {tuple(shape)} expected"
    return Piece(local, tuple(offsets), tuple(tensor.shape))


def cut_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """The part of `whole` that `piece(tensor)` is of its own whole."""
    part = piece(tensor)
    for dimension, (start, size) in enumerate(zip(part.offsets, part.values.shape, strict=True)):
        whole = whole.narrow(dimension, start if size else 0, size)
    return whole


@torch.no_grad()
def copy_whole(tensor: Tensor, whole: Tensor) -> None:
    """Fill a tensor, of which this process may hold a part only, from all of its values."""
    piece(tensor).values.copy_(cut_like(whole, tensor))


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process; all of them have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(model: nn.Module, mesh: Mesh | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by name, whole, one at a time, of all stages of a pipeline; all processes go through it."""
    mesh = mesh or Mesh()
    here = dict(model.named_parameters())
    if mesh.pipeline is None:
        yield from ((name, gather(parameter.detach())) for name, parameter in here.items())
        return
    group = mesh.pipeline.get_group()
    stages: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(stages, {name: (p.shape, p.dtype) for name, p in here.items()}, group)
    seen: set[str] = set()
    for rank, stage in enumerate(stages):
        for name, (shape, dtype) in stage.items():
            if name not in seen:
                mine = rank == dist.get_rank(group)
                whole = gather(here[name].detach()) if mine else torch.empty(shape, dtype=dtype)
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
