"""Functions of whole matrices, such as Muon's, on matrices of which each process holds some rows.

The matrices are dealt out: each process gets all rows of every n-th one, computes, and sends the rows of the result
back to those who hold them. So nothing is computed twice, and nobody ever holds more than one whole matrix; what is
sent is each matrix once there and once back, in bf16.

Matrices that are cut in two directions (by tensor parallelism, and what is left of them by data) are dealt out as well,
but each is gathered on every process, and sent to every process. Of a stack of experts each process keeps its own, and
gathers those alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from treadle.parallel.shards import Parts, across, cut_like, gather, spread_like, tensor_cut

Function = Callable[[int, Tensor], Tensor]
Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]


@dataclass(frozen=True)
class _Matrix:
    """One to be dealt: what this process holds of it, and its whole shape. place: which of a stack, if in one."""

    number: int
    values: Tensor
    shape: torch.Size
    place: int = 0


def on_whole_matrices(
    parameters: Sequence[Tensor], values: Sequence[Tensor], parts: Sequence[Parts], function: Function
) -> list[Tensor]:
    """`function(number, whole)` of each matrix (or stack of them), cut as its parameter is. Collective.

    values: bf16, each what this process holds of a tensor that is spread like the parameter; function returns bf16.
    parts: of each parameter, as in `treadle.parallel.shards`.
    A stack that is cut between its matrices is a smaller stack; one that is cut within them is so many matrices.
    """
    results: dict[tuple[int, int], Tensor] = {}
    dealt: dict[Groups, list[_Matrix]] = {}
    crossed: dict[DeviceMesh, list[int]] = {}
    for number, (parameter, local) in enumerate(zip(parameters, values, strict=True)):
        groups = _groups(parameter)
        if not isinstance(parameter, DTensor) or groups == (None, None):
            results[number, 0] = function(number, local)
        elif groups is None and parameter.ndim == 3 and tensor_cut(parameter) is not None:
            whole, cut_again = across(local, parameter, parts[number])
            results[number, 0] = cut_again(function(number, whole))
        elif groups is None:
            crossed.setdefault(parameter.device_mesh, []).append(number)
        elif parameter.ndim == 3 and groups[0] is not None:
            matrices = [_Matrix(number, each, parameter.shape[1:], place) for place, each in enumerate(local)]
            dealt.setdefault(groups, []).extend(matrices)
        else:
            dealt.setdefault(groups, []).append(_Matrix(number, local, parameter.shape))
    for groups, matrices in dealt.items():
        round_size = _size(groups[0]) * _size(groups[1])
        for start in range(0, len(matrices), round_size):
            chosen = matrices[start : start + round_size]
            found = _deal(chosen, groups, function)
            results |= {(m.number, m.place): result for m, result in zip(chosen, found, strict=True)}
    for mesh, numbers in crossed.items():
        for start in range(0, len(numbers), mesh.size()):
            round_ = numbers[start : start + mesh.size()]
            whole_of = _deal_crossed(round_, parameters, values, parts, mesh, function)
            results |= {(n, 0): cut_like(whole_of[n], parameters[n], parts[n]) for n in round_}
    return [_collected(number, local, results) for number, local in enumerate(values)]


def _collected(number: int, local: Tensor, results: dict[tuple[int, int], Tensor]) -> Tensor:
    first = results[number, 0]
    if first.ndim == local.ndim:
        return first
    return torch.stack([results[number, place] for place in range(local.shape[0])])


def _deal_crossed(
    numbers: list[int],
    parameters: Sequence[Tensor],
    values: Sequence[Tensor],
    parts: Sequence[Parts],
    mesh: DeviceMesh,
    function: Function,
) -> dict[int, Tensor]:
    """One round: the k-th process of the mesh computes the k-th matrix. Whole results, on every process."""
    places = [_place(k, tuple(mesh.shape)) for k in range(len(numbers))]
    here, results = tuple(mesh.get_coordinate() or ()), dict[int, Tensor]()
    for number, place in zip(numbers, places, strict=True):
        whole = gather(spread_like(values[number], parameters[number]), parts[number])
        results[number] = whole if place == here else whole.new_empty(0)
    for number, place in zip(numbers, places, strict=True):
        if place == here:
            results[number] = function(number, results[number]).contiguous()
    for number, place in zip(numbers, places, strict=True):
        if place != here:
            results[number] = values[number].new_empty(parameters[number].shape)
        for dimension, source in enumerate(place):  # along a line, then from that line over a plane, and so on
            if here[dimension + 1 :] == place[dimension + 1 :]:
                dist.broadcast(results[number], group=mesh.get_group(dimension), group_src=source)
    return results


def _place(number: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where the process of this number is, in a mesh of these sizes."""
    place = []
    for size in reversed(sizes):
        number, rest = divmod(number, size)
        place.append(rest)
    return tuple(reversed(place))


def _groups(parameter: Tensor) -> Groups | None:
    """Who shares the rows, and who holds the same rows; (None, None) if all that is needed is here; None: otherwise."""
    if not isinstance(parameter, DTensor):
        return None, None
    stack = parameter.ndim == 3
    rows: list[dist.ProcessGroup] = []
    copies: list[dist.ProcessGroup] = []
    if tensor_cut(parameter) is not None:  # its rows may be stacked, or its columns be elsewhere
        return None
    for dimension, placement in enumerate(parameter.placements):
        if parameter.device_mesh.size(dimension) == 1 or (stack and getattr(placement, "dim", None) == 0):
            continue  # nobody to share with, or a stack cut between its matrices
        if not (placement.is_shard(1 if stack else 0) or placement.is_replicate()):
            return None
        (copies if placement.is_replicate() else rows).append(parameter.device_mesh.get_group(dimension))
    if len(rows) > 1 or len(copies) > 1:
        return None
    return (rows[0] if rows else None, copies[0] if copies else None)


def _deal(matrices: list[_Matrix], groups: Groups, function: Function) -> list[Tensor]:
    """One round: as many matrices as processes, or fewer."""
    row_group, copy_group = groups
    size, copies = _size(row_group), _size(copy_group)
    hands = [matrices[k * size : (k + 1) * size] for k in range(copies)]
    found = _exchange(hands[_rank(copy_group)], row_group, function)
    if copy_group is None:
        return found
    lengths = [sum(matrix.values.numel() for matrix in hand) for hand in hands]
    padded = matrices[0].values.new_zeros(max(lengths))
    if found:
        padded[: lengths[_rank(copy_group)]] = torch.cat([result.flatten() for result in found])
    shared = [torch.empty_like(padded) for _ in range(copies)]
    dist.all_gather(shared, padded, group=copy_group)
    results: list[Tensor] = []
    for hand, page in zip(hands, shared, strict=True):
        start = 0
        for matrix in hand:
            results.append(page[start : start + matrix.values.numel()].view_as(matrix.values))
            start += matrix.values.numel()
    return results


def _exchange(matrices: list[_Matrix], group: dist.ProcessGroup | None, function: Function) -> list[Tensor]:
    """Rank k of the group computes the k-th matrix; everybody gets back the rows that are its own."""
    if group is None or not matrices:
        return [function(matrix.number, matrix.values) for matrix in matrices]
    size, rank = _size(group), _rank(group)
    sent = [matrix.values.numel() for matrix in matrices] + [0] * (size - len(matrices))
    mine = matrices[rank] if rank < len(matrices) else None
    received = [0] * size if mine is None else [rows * mine.shape[1] for rows in _rows(mine.shape[0], size)]
    outgoing = torch.cat([matrix.values.flatten() for matrix in matrices])
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    if mine is not None:
        incoming = function(mine.number, incoming.view(mine.shape)).contiguous().flatten()
    dist.all_to_all_single(outgoing, incoming, sent, received, group=group)
    pieces = outgoing.split(sent)
    return [piece.view_as(matrix.values) for piece, matrix in zip(pieces, matrices, strict=False)]


def _rows(rows: int, size: int) -> list[int]:
    """How many rows each of `size` processes has: as torch.chunk deals them."""
    each = -(-rows // size)
    return [max(0, min(each, rows - rank * each)) for rank in range(size)]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
