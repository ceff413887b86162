"""Mixtures of experts in training: their own losses, what is measured of their load, and the balancing bias.

A mixture's losses join the gradient inside the layer's own backward (see `treadle.nn.moe.Observation`), weighted so
that the whole objective is

    sum(loss) / valid tokens  +  sum over layers of weight * sum(layer's loss) / positions

The logged `loss` stays the first term, comparable with a dense model's; the others are logged beside it.
E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treadle.nn.moe import MoE, Observation
from treadle.nn.transformer import Transformer
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import cut_like, local


@dataclass(frozen=True)
class Load:
    """One layer's load over a step. counts_E: rows that chose each expert, fp32. dropped: rows beyond the capacity.

    balance_loss, z_loss: means over positions, without their weights.
    """

    counts_E: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    dropped: Tensor

    @property
    def imbalance(self) -> Tensor:
        """The busiest expert's load over the mean: 1 is even."""
        return self.counts_E.max() / self.counts_E.mean()

    @property
    def dropped_share(self) -> Tensor:
        return self.dropped / self.counts_E.sum()


def mixtures(model: nn.Module) -> dict[str, MoE]:
    """The mixtures of a model (or of one pipeline stage of it) by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@contextmanager
def observed(
    model: Transformer, positions: int, loss_scale: float | Tensor = 1.0, mesh: Mesh | None = None
) -> Iterator[dict[str, Load]]:
    """While open, each backward through the model adds the mixtures' losses and records their load.

    positions: tokens that will pass through the model, over all micro-batches (and ranks) of the step.
    The dictionary is empty until the end, then it holds each mixture's load, summed over the mesh, by name; also of
    the mixtures that are on other stages of a pipeline.
    """
    found, loads, mesh = mixtures(model), dict[str, Load](), mesh or Mesh()
    for module in found.values():
        device = model.device
        # Where a mixture is cut between processes, each of them adds its losses, which are those of all its experts.
        scale = torch.as_tensor(loss_scale, dtype=torch.float32, device=device) / (positions * mesh.layout.tensor)
        record_R = torch.zeros(module.experts + 3, device=device, requires_grad=True)
        module.observation = Observation(scale, record_R)
    try:
        yield loads
        records: dict[str, Tensor] = {}
        for name, module in found.items():
            assert module.observation is not None
            record = module.observation.record_R.grad
            if record is not None:  # else no backward reached it
                records[name] = record
        if records:
            summed = mesh.sum(torch.cat(list(records.values()))).split([len(r) for r in records.values()])
            records = dict(zip(records, summed, strict=True))
        for name, record_R in mesh.union(records).items():
            balance, z, dropped = record_R[-3:].unbind()
            loads[name] = Load(record_R[:-3], balance / positions, z / positions, dropped)
    finally:
        for module in found.values():
            module.observation = None


def load_metrics(loads: dict[str, Load]) -> dict[str, Tensor]:
    """What to log of a step's loads: means over layers, and the worst layer's imbalance. Empty without mixtures."""
    if not loads:
        return {}
    each = list(loads.values())
    imbalance = torch.stack([load.imbalance for load in each])
    return {
        "balance_loss": torch.stack([load.balance_loss for load in each]).mean(),
        "router_z_loss": torch.stack([load.z_loss for load in each]).mean(),
        "expert_imbalance": imbalance.mean(),
        "expert_imbalance_max": imbalance.max(),
        "dropped": torch.stack([load.dropped_share for load in each]).mean(),
    }


@torch.no_grad()
def balance(model: nn.Module, loads: dict[str, Load]) -> None:
    """Once per optimizer step: raise the bias of experts with less than the mean load, lower the others' (2408.15664).

    loads: of the whole step, on all processes.
    """
    for name, module in mixtures(model).items():
        bias, rate = module.router.balance_bias, module.bias_rate
        if bias is not None and rate is not None and name in loads:
            counts_E = loads[name].counts_E
            move_E = torch.sign(counts_E.mean() - counts_E).to(bias.device)
            local(bias).add_(cut_like(move_E, bias), alpha=rate)
