"""Expert parallelism: the experts of a mixture live on different processes, and rows travel to them and back.

GShard (Lepikhin et al. 2020, arXiv:2006.16668), dropless as in MegaBlocks (2211.15841). The processes that share one
copy of the weights (shard x context) are dealt into groups of `parallel.expert`, neighbours first. Each process of a
group holds E / size experts, and those are sharded over the groups as any weight is (FSDP). Every process goes on
routing its own tokens: rows are sorted by expert, which is by process too, sent by one all-to-all, computed where the
expert lives, and sent back by a second one. The mixture itself knows nothing of it; its `send` and `receive` are
replaced.

An expert's gradient has the rows of the whole group in it when the backward reaches its weight, so it is summed over
the groups only: over the mesh that the weight is sharded over, and never over the group.

With a capacity, an expert takes its rows from each process's tokens separately, as it does without expert parallelism:
at most ceil(capacity * T * K / E) of the T tokens that one process has in one micro-batch.

E experts, P processes of a group, L = E / P experts on each, N rows of this process, R rows that arrive here, D dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, autograd, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from treadle.nn.linear import GroupedLinear
from treadle.nn.moe import MoE
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import local


def distribute_experts(model: nn.Module, mesh: Mesh) -> list[nn.Module]:
    """Leave this process its share of the experts of every mixture, and let rows travel.

    Returns the modules with row counts of their own, that must not be compiled: mixtures and their grouped matrices.
    For a model on the meta device, before it is compiled or sharded. A no-op unless `parallel.expert` is more than one.
    """
    if mesh.expert is None:
        return []
    changed: list[nn.Module] = []
    for moe in [module for module in model.modules() if isinstance(module, MoE)]:
        for grouped in experts_of(moe):
            for name, parameter in list(grouped.named_parameters(recurse=False)):
                shared = nn.Parameter(_share(parameter, mesh), parameter.requires_grad)
                grouped.register_parameter(name, shared)
            grouped.forward = _Here(grouped)  # type: ignore[method-assign]
        exchange = Exchange(moe, mesh.expert.get_group())
        moe.send, moe.receive = exchange.send, exchange.receive  # type: ignore[method-assign]
        changed += [moe, *experts_of(moe)]
    return changed


def experts_of(moe: MoE) -> list[GroupedLinear]:
    """The modules whose parameters count experts."""
    return [module for module in moe.modules() if isinstance(module, GroupedLinear)]


def _share(parameter: Tensor, mesh: Mesh) -> DTensor:
    """This process's experts out of all, as a tensor that knows the others, and those who share each of its own."""
    assert mesh.expert is not None
    assert parameter.is_meta
    cut: Sequence[Placement] = parameter.placements if isinstance(parameter, DTensor) else ()
    here = local(parameter)[: parameter.shape[0] // mesh.expert.size()]
    where = mesh.expert if mesh.expert_tensor is None else mesh.expert_tensor
    return DTensor.from_local(
        here, where, [Shard(0), *cut], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


class _Here:
    """The forward of a GroupedLinear of which only some experts are here."""

    def __init__(self, grouped: GroupedLinear):
        self.grouped = grouped

    def __call__(self, x_NI: Tensor, ends_E: Tensor, *, tail: bool = False) -> Tensor:
        weight, bias = _here(self.grouped.weight), self.grouped.bias
        return self.grouped.multiply(weight, None if bias is None else _here(bias), x_NI, ends_E, tail=tail)


def _here(parameter: Tensor) -> Tensor:
    # Of what is cut by tensor parallelism too, a module sees what is here by itself.
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass
class Flight:
    """Rows under way; in the backward their gradients fly the other way.

    leaving, arriving: how many to and from each process of the group. work: what to wait for. buffer: the gradients as
    they arrive.
    """

    group: dist.ProcessGroup
    leaving: list[int]
    arriving: list[int]
    buffer: Tensor | None = None
    work: Any = None

    def start(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        buffer = rows.new_empty(sum(arriving), rows.shape[1])
        self.work = dist.all_to_all_single(
            buffer, rows.contiguous(), arriving, leaving, group=self.group, async_op=True
        )
        return buffer

    def land(self) -> None:
        self.work.wait()
        self.work = None


class _Start(autograd.Function):
    """Send rows; what is returned may be read after `_Land` only."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(rows_ND, flight.leaving, flight.arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        flight.land()
        grad_ND, flight.buffer = flight.buffer, None
        return grad_ND, None


class _Land(autograd.Function):
    """Wait for rows. In the backward their gradients start here and land in `_Start`: autograd runs latest operations
    first, so whatever the forward did between the two is done between them again."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.land()
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        flight.buffer = flight.start(grads[0], flight.arriving, flight.leaving)
        return grads[0], None  # of the right shape, and alive until it has been sent; the real one is in the flight


class _Permute(autograd.Function):
    """Rows in another order; the backward gathers too, where PyTorch's would add."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


@dataclass(frozen=True)
class Sent:
    """What `receive` needs of what `send` began. arrived_PL: rows from each process for each expert here."""

    rows_RD: Tensor
    flight: Flight
    arrived_PL: Tensor
    rows: int


class Exchange:
    """`send` and `receive` of one mixture whose experts are spread over a group of processes."""

    def __init__(self, moe: MoE, group: dist.ProcessGroup):
        self.moe, self.group = moe, group

    # Not compiled: how many rows arrive is another number each time.
    @torch.compiler.disable
    def send(self, rows_ND: Tensor, kept_E: Tensor) -> Sent:
        """Start the rows on their way to their experts. Collective, and returns while they travel."""
        kept_PL = kept_E.view(self.group.size(), -1)
        arrived_PL = torch.empty_like(kept_PL)
        dist.all_to_all_single(arrived_PL, kept_PL.contiguous(), group=self.group)
        leaving, arriving = self.rows(rows_ND, kept_PL, arrived_PL)
        flight = Flight(self.group, leaving, arriving)
        sent_ND = rows_ND[: sum(leaving)]  # the others are beyond the capacity
        return Sent(_Start.apply(sent_ND, flight), flight, arrived_PL, rows_ND.shape[0])

    def rows(self, rows_ND: Tensor, kept_PL: Tensor, arrived_PL: Tensor) -> list[list[int]]:
        """How many go to each process of the group, and come from each.

        The one time that the host waits for the device: a collective has to know its sizes. (With a capacity they
        are bounded, and rows could be sent in slots of fixed size, mostly empty for some experts, without it.)
        """
        return torch.stack((kept_PL.sum(1), arrived_PL.sum(1))).tolist()  # type: ignore[no-any-return]

    @torch.compiler.disable
    def receive(self, sent: Sent) -> Tensor:
        """The experts' outputs for the rows that were sent, in their order. Collective."""
        arriving, leaving = sent.flight.arriving, sent.flight.leaving
        order_R, inverse_R = by_expert(sent.arrived_PL, sum(arriving))
        rows_RD = _Permute.apply(_Land.apply(sent.rows_RD, sent.flight), order_R, inverse_R)
        out_RD = self.moe.compute(rows_RD, sent.arrived_PL.sum(0), tail=False)
        back = Flight(self.group, arriving, leaving)
        out_RD = _Start.apply(_Permute.apply(out_RD, inverse_R, order_R), back)
        return F.pad(_Land.apply(out_RD, back), (0, 0, 0, sent.rows - sum(leaving)))


def by_expert(arrived_PL: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows that arrived by process, then expert, in the order of expert, then process.  -> order_R, inverse_R

    rows: how many, so that the host need not ask.
    """
    P, L = arrived_PL.shape
    sizes_B, moved_B = arrived_PL.flatten(), arrived_PL.t().flatten()  # blocks of rows that stay together
    starts_PL = (sizes_B.cumsum(0) - sizes_B).view(P, L)
    moved_LP = (moved_B.cumsum(0) - moved_B).view(L, P)
    place_R = torch.arange(rows, device=arrived_PL.device)
    away_LP = starts_PL.t() - moved_LP
    order_R = place_R + away_LP.flatten().repeat_interleave(moved_B, output_size=rows)
    inverse_R = place_R - away_LP.t().flatten().repeat_interleave(sizes_B, output_size=rows)
    return order_R, inverse_R
