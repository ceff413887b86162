"""One step's forward and backward over a batch, in micro-batches. Every recipe goes through here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.data.packing import Batch
from treadle.nn.transformer import Transformer
from treadle.parallel.context import own_part, own_targets
from treadle.parallel.data import synchronise_gradients
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import pipeline_of
from treadle.train.losses import LossFunction
from treadle.train.routing import Load, load_metrics, observed
from treadle.train.timing import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """Means over the batch's valid tokens, scalars on the device (reading one waits).

    loss: without penalties. metrics: what the loss function logs, and its penalties, by name.
    loads: rows per expert of each mixture of experts, by name.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    tokens: int
    loads: dict[str, Load] = field(default_factory=dict)


def forward_backward(
    model: Transformer,
    batches: Sequence[Batch],
    loss_function: LossFunction,
    *,
    loss_scale: float | Tensor = 1.0,
    watch: Stopwatch | None = None,
    mesh: Mesh | None = None,
) -> StepResult:
    """Add the gradient of sum(loss) / valid tokens, over all micro-batches of a step, to the parameters' `.grad`.

    batches: this process's rows of the step, whole where the mesh cuts them over ranks (`own_part`).
    Sums and means are over all processes of the mesh, and so is the gradient.

    Mixtures of experts add the gradient of their own losses, which `loss` does not count (`treadle.train.routing`).
    loss_scale multiplies the gradient only (fp16). On a pipeline the loss function runs on every stage, up to its one
    call of `model.hidden`. Raises ValueError when no token at all counts.
    """
    watch, mesh = watch or Stopwatch("cpu"), mesh or Mesh()
    device = model.device
    here = sum(batch.tokens_BS.numel() for batch in batches) // mesh.layout.context
    tokens, positions = mesh.sum_counts(sum(own_targets(batch, mesh) for batch in batches), here)
    if tokens == 0:
        raise ValueError("no token of this batch counts towards the loss")
    pipeline = pipeline_of(model)
    sums: dict[str, Tensor] = {}

    def objective(model: Transformer, batch: Batch) -> Tensor:
        loss = loss_function(model, batch)  # in a pipeline, only the last stage returns from it
        plain = loss.total.detach() - sum(loss.penalties.values())
        for name, value in ({"loss": plain} | loss.metrics | loss.penalties).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
        return loss.total * (loss_scale / tokens)

    with observed(model, positions, loss_scale, mesh) as loads:
        if pipeline is not None:
            with watch("pipeline"):
                pipeline.step(objective, [own_part(batch, mesh, device) for batch in batches])
        else:
            for number, batch in enumerate(batches, start=1):
                synchronise_gradients(model, number == len(batches))
                with watch("forward"):
                    scaled = objective(model, own_part(batch, mesh, device))
                with watch("backward"):
                    scaled.backward()
    if sums:
        sums = dict(zip(sums, mesh.sum(torch.stack(list(sums.values()))).unbind(), strict=True))
    metrics = {name: value / tokens for name, value in mesh.union(sums).items()}
    return StepResult(metrics.pop("loss"), metrics | load_metrics(loads), tokens, loads)
