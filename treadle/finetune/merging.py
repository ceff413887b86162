"""Updates in the weights, and out of them again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from treadle.errors import ConfigError
from treadle.finetune.adapted import adapted
from treadle.finetune.bottleneck import Around


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put the updates of a whole model into its weights: summed in float32, in place. What was there is kept, for
    `unmerge`. Does nothing the second time. Raises ConfigError for bottlenecks, which no weight can hold."""
    if list(_bottlenecks(model)):
        raise ConfigError("finetune.method: adapter, whose bottlenecks no weight of the model can hold; keep them")
    for _, layer in adapted(model):
        if not layer.applied:
            continue
        for leaf, parameter in layer.named_parameters(recurse=False):
            layer.kept[leaf] = parameter.detach().clone()
            parameter.copy_(layer.merged(leaf, parameter))
        layer.applied = False


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """The weights as they were before `merge`, to the bit, and the updates beside them again."""
    for _, layer in adapted(model):
        for leaf, values in layer.kept.items():
            getattr(layer, leaf).copy_(values)
        layer.kept, layer.applied = {}, True


@contextmanager
def without_updates(model: nn.Module) -> Iterator[None]:
    """The model as it was before fine-tuning: a reference, without a second copy of it."""
    switched = [layer for _, layer in adapted(model) if layer.applied] + list(_bottlenecks(model))
    for each in switched:
        each.applied = False
    try:
        yield
    finally:
        for each in switched:
            each.applied = True


def _bottlenecks(model: nn.Module) -> Iterator[Around]:
    for module in model.modules():
        yield from (hook for hook in module._forward_hooks.values() if isinstance(hook, Around))
