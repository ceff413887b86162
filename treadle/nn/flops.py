"""How much a model computes and keeps: facts from the blocks, summed.

A matmul of a [T, I] by an [I, O] matrix counts 2*T*I*O. Attention counts the causal half only (what must be computed),
the convention of PaLM's appendix B (arXiv:2204.02311) halved for causality; it is named wherever MFU is reported.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.transformer import Head


def parameter_count(model: nn.Module) -> int:
    """Parameters, shared ones once, all experts of a mixture."""
    return sum(p.numel() for p in model.parameters())


def active_parameter_count(model: nn.Module) -> int:
    """Parameters that one token meets: of a mixture's experts only as many as are chosen."""
    grouped = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    idle = sum((m.experts - m.active) * (p.numel() // m.experts) for m in grouped for p in m.parameters(recurse=False))
    return parameter_count(model) - idle


def forward_flops(model: nn.Module, length: float) -> float:
    """Forward FLOPs per token, for sequences of `length` tokens; with packed documents, their mean length.

    Of a model with `multi_token` that of inference, which leaves it out.
    """
    total = 0.0
    module: Any
    for module in _inference_modules(model):
        if isinstance(module, Linear | Head):
            total += 2 * module.weight.numel()
        if isinstance(module, GroupedLinear):
            total += 2 * module.active_elements()
        if hasattr(module, "mixing_flops"):
            total += module.mixing_flops(length)
    return total


def training_flops(model: nn.Module, length: float) -> float:
    """Forward and backward FLOPs per token (backward is twice the forward; recomputation is not counted).

    With `multi_token`, whose modules see every token, and each of which passes through the head once more.
    """
    forward = forward_flops(model, length)
    whole: Any = model
    if getattr(model, "multi_token", None) is not None:
        forward += forward_flops(whole.multi_token, length)
        forward += len(whole.multi_token.layers) * forward_flops(whole.head, length)
    return 3 * forward


def cache_elements(model: nn.Module) -> int:
    """Numbers kept per token in inference, over all layers."""
    modules: list[Any] = [module for module in _inference_modules(model) if hasattr(module, "cache_elements")]
    return sum(module.cache_elements() for module in modules)


def state_elements(model: nn.Module) -> int:
    """Numbers kept per row in inference, whatever its length, over all layers: the states of recurrent mixers."""
    modules: list[Any] = [module for module in _inference_modules(model) if hasattr(module, "state_elements")]
    return sum(module.state_elements() for module in modules)


def _inference_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but those of the model's `multi_token`, which only training runs."""
    extra = getattr(model, "multi_token", None)
    left_out = set() if extra is None else set(extra.modules())
    return (module for module in model.modules() if module not in left_out)
