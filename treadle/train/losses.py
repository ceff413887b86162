"""Losses: sums over tokens, so that any split of a batch over micro-batches and ranks adds up exactly."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from treadle.data.packing import Batch
from treadle.nn.transformer import Transformer


@dataclass(frozen=True)
class Loss:
    """Sums over the tokens that count.

    total: what is minimised (fp32 scalar, differentiable). penalties: parts of it, by name (detached), that are there
    to steer training: logged apart, and taken off the loss that is reported. metrics: further sums to be logged.
    """

    total: Tensor
    penalties: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[Transformer, Batch], Loss]


def cross_entropy(model: Transformer, batch: Batch, *, z_loss: float = 0.0, attention: str = "auto") -> Loss:
    """Next-token cross entropy in nats, summed over the targets that count. attention: the backend's name."""
    hidden_BSD = model.hidden(batch.tokens_BS, replace(batch.context, backend=attention))
    total, penalty = model.head.penalised_cross_entropy(hidden_BSD, batch.targets_BS, z_loss=z_loss)
    return Loss(total, {"z_loss": penalty} if z_loss else {})
