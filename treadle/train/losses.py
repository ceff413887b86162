"""Losses: sums over tokens, so that any split of a batch over micro-batches and ranks adds up exactly."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from treadle.attention import AttentionContext
from treadle.data.packing import Batch
from treadle.nn.multi_token import ahead
from treadle.nn.transformer import Transformer
from treadle.train.config import TrainingConfig


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


def cross_entropy(
    model: Transformer, batch: Batch, *, z_loss: float = 0.0, smoothing: float = 0.0, attention: str = "auto"
) -> Loss:
    """Next-token cross entropy in nats, summed over the targets that count. attention: the backend's name.

    smoothing: share of each target that is spread over the vocabulary; the loss that is reported has it in it.
    A model that has `multi_token` adds its loss, as the penalty `multi_token_loss`.
    """
    context = model.with_tables(replace(batch.context, backend=attention))  # once for all that follows
    hidden_BSD = model.hidden(batch.tokens_BS, context)
    total, penalty = model.head.penalised_cross_entropy(
        hidden_BSD, batch.targets_BS, z_loss=z_loss, smoothing=smoothing
    )
    penalties = {"z_loss": penalty} if z_loss else {}
    if model.config.multi_token is not None:
        extra = multi_token_loss(model, hidden_BSD, batch, context, smoothing)
        total, penalties["multi_token_loss"] = total + extra, extra.detach()
    return Loss(total, penalties)


def training_loss(training: TrainingConfig) -> LossFunction:
    """The cross entropy that a `training` section asks for."""
    t = training
    return partial(cross_entropy, z_loss=t.z_loss, smoothing=t.label_smoothing, attention=t.attention)


def multi_token_loss(
    model: Transformer, hidden_BSD: Tensor, batch: Batch, context: AttentionContext, smoothing: float = 0.0
) -> Tensor:
    """weight / depth * sum over k = 1 ... depth of the cross entropy of each position's k-th further target.

    The k-th further target of a position is the target k positions on in the same document, where there is one and it
    counts. Like the main loss it is a sum: the loop divides it by the number of next-token targets, of which there are
    more (DeepSeek-V3's eq. 24 divides by the whole length too). hidden_BSD: of `model.hidden`.  -> scalar
    """
    config = model.config.multi_token
    assert config is not None
    total = hidden_BSD.new_zeros((), dtype=torch.promote_types(hidden_BSD.dtype, torch.float32))
    for k, x_BSD in enumerate(model.further(hidden_BSD, batch.tokens_BS, context), start=1):
        targets_BS = ahead(batch.targets_BS, k, context)
        total = total + model.head.penalised_cross_entropy(x_BSD, targets_BS, smoothing=smoothing)[0]
    return config.weight / config.depth * total
