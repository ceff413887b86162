"""Functions of whole matrices, such as Muon's, on matrices of which each process holds some rows.

The matrices are dealt out: each process gets all rows of every n-th one, computes, and sends the rows of the result
back to those who hold them. So nothing is computed twice, and nobody ever holds more than one whole matrix; what is
sent is each matrix once there and once back, in bf16.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from treadle.parallel.shards import cut_like

Function = Callable[[int, Tensor], Tensor]
Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]


def on_whole_matrices(parameters: Sequence[Tensor], values: Sequence[Tensor], function: Function) -> list[Tensor]:
    """`function(number, whole)` of each matrix (or stack of them), cut as its parameter is. Collective.

    values: bf16, each what this process holds of a tensor that is spread like the parameter; function returns bf16.
    """
    results: dict[int, Tensor] = {}
    dealt: dict[Groups, list[int]] = {}
    for number, (parameter, local) in enumerate(zip(parameters, values, strict=True)):
        groups = _groups(parameter)
        if not isinstance(parameter, DTensor) or groups == (None, None):
            results[number] = function(number, local)
        elif groups is None:  # spread in more than one direction
            spread: DTensor = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            results[number] = cut_like(function(number, spread.full_tensor()), parameter)
        else:
            dealt.setdefault(groups, []).append(number)
    for groups, numbers in dealt.items():
        round_size = _size(groups[0]) * _size(groups[1])
        for start in range(0, len(numbers), round_size):
            chosen = numbers[start : start + round_size]
            results |= _deal(chosen, [parameters[n] for n in chosen], [values[n] for n in chosen], groups, function)
    return [results[number] for number in range(len(parameters))]


def _groups(parameter: Tensor) -> Groups | None:
    """Who shares the rows, and who holds the same rows; (None, None) if all that is needed is here; None: otherwise."""
    if not isinstance(parameter, DTensor):
        return None, None
    rows: list[dist.ProcessGroup] = []
    copies: list[dist.ProcessGroup] = []
    for dimension, placement in enumerate(parameter.placements):
        if parameter.device_mesh.size(dimension) == 1:
            continue
        if not (placement.is_shard(0) or placement.is_replicate()):
            return None
        (copies if placement.is_replicate() else rows).append(parameter.device_mesh.get_group(dimension))
    if len(rows) > 1 or len(copies) > 1:
        return None
    if parameter.ndim == 3 and rows:  # a stack is cut between its matrices
        return None, None
    return (rows[0] if rows else None, copies[0] if copies else None)


def _deal(
    numbers: list[int], parameters: list[Tensor], values: list[Tensor], groups: Groups, function: Function
) -> dict[int, Tensor]:
    """One round: as many matrices as processes, or fewer."""
    row_group, copy_group = groups
    size, copies = _size(row_group), _size(copy_group)
    hands = [range(k * size, min((k + 1) * size, len(numbers))) for k in range(copies)]
    mine = hands[_rank(copy_group)]
    own = [numbers[k] for k in mine]
    found = _exchange(own, [parameters[k] for k in mine], [values[k] for k in mine], row_group, function)
    if copy_group is None:
        return dict(zip((numbers[k] for k in mine), found, strict=True))
    lengths = [sum(values[k].numel() for k in hand) for hand in hands]
    padded = values[0].new_zeros(max(lengths))
    if found:
        padded[: lengths[_rank(copy_group)]] = torch.cat([result.flatten() for result in found])
    shared = [torch.empty_like(padded) for _ in range(copies)]
    dist.all_gather(shared, padded, group=copy_group)
    results: dict[int, Tensor] = {}
    for hand, page in zip(hands, shared, strict=True):
        start = 0
        for k in hand:
            results[numbers[k]] = page[start : start + values[k].numel()].view_as(values[k])
            start += values[k].numel()
    return results


def _exchange(
    numbers: list[int],
    parameters: list[Tensor],
    values: list[Tensor],
    group: dist.ProcessGroup | None,
    function: Function,
) -> list[Tensor]:
    """Rank k of the group computes the k-th matrix; everybody gets back the rows that are its own."""
    if group is None:
        return [function(number, local) for number, local in zip(numbers, values, strict=True)]
    size, rank = _size(group), _rank(group)
    sent = [local.numel() for local in values] + [0] * (size - len(values))
    shape = parameters[rank].shape if rank < len(parameters) else None
    received = [0] * size if shape is None else [rows * shape[1] for rows in _rows(shape[0], size)]
    outgoing = torch.cat([local.flatten() for local in values])
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    if shape is not None:
        incoming = function(numbers[rank], incoming.view(shape)).contiguous().flatten()
    dist.all_to_all_single(outgoing, incoming, sent, received, group=group)
    pieces = outgoing.split(sent)
    return [piece.view_as(local) for piece, local in zip(pieces, values, strict=False)]


def _rows(rows: int, size: int) -> list[int]:
    """How many rows each of `size` processes has: as torch.chunk deals them."""
    each = -(-rows // size)
    return [max(0, min(each, rows - rank * each)) for rank in range(size)]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
