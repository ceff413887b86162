"""One step's forward and backward over a batch, in micro-batches. Every recipe goes through here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.data.packing import Batch
from treadle.nn.transformer import Transformer
from treadle.train.losses import LossFunction
from treadle.train.timing import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """Means over the batch's valid tokens, scalars on the device (reading one waits).

    loss: without penalties. metrics: what the loss function logs, and its penalties, by name.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    tokens: int


def forward_backward(
    model: Transformer,
    batches: Sequence[Batch],
    loss_function: LossFunction,
    *,
    loss_scale: float | Tensor = 1.0,
    watch: Stopwatch | None = None,
) -> StepResult:
    """Add the gradient of sum(loss) / valid tokens, over all micro-batches of a step, to the parameters' `.grad`.

    loss_scale multiplies the gradient only (fp16). Raises ValueError when no token at all counts.
    """
    watch = watch or Stopwatch("cpu")
    tokens = sum(batch.valid_tokens for batch in batches)
    if tokens == 0:
        raise ValueError("no token of this batch counts towards the loss")
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        with watch("forward"):
            loss = loss_function(model, batch)
        with watch("backward"):
            (loss.total * (loss_scale / tokens)).backward()
        total = total + loss.total.detach() - sum(loss.penalties.values())
        for name, value in (loss.metrics | loss.penalties).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
    return StepResult(total / tokens, {name: value / tokens for name, value in sums.items()}, tokens)
