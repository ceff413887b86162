"""Processes that see different rows: FSDP, HSDP and DDP, all by PyTorch's `fully_shard` on one mesh.

Weights are sharded over shard x context and copied over `replicate`. Plain data parallelism (DDP) is the mesh whose
shard size is one, and no engine of its own: so precision, clipping, checkpoints and optimizers see one kind of
parameter, and no layout needs its own tests of those. The price is a copy of a layer's weights in the compute dtype,
freed with the layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from treadle.nn.transformer import Transformer
from treadle.parallel.config import ParallelConfig
from treadle.parallel.mesh import Mesh


def shard_data(model: Transformer, mesh: Mesh, config: ParallelConfig) -> None:
    """Shard each layer, and what is left (embedding, last norm, head) with the model itself. A no-op for one process.

    The model may be on the meta device; activation checkpointing and compilation come before. Weights are gathered in
    the compute dtype, but for modules that compute in float32 (`full_precision`); gradients are summed in float32.
    """
    if mesh.fsdp is None:
        return
    options: dict[str, Any] = {"mesh": mesh.fsdp, "reshard_after_forward": config.reshard != "never"}
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu")
    # Casts are explicit in the blocks: what flows through them is not to be touched here.
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in sharded_units(model):
        for module in wide_units(model, layer):
            fully_shard(module, mp_policy=wide, **options)
        fully_shard(layer, mp_policy=narrow, **options)
    # The head is used after `hidden` has returned (and the embedding again, by multi-token prediction), so the root's
    # weights stay until the backward frees them; `release` does it where there is none.
    fully_shard(model, mp_policy=narrow, **{**options, "reshard_after_forward": False})
    register_fsdp_forward_method(model, "hidden")
    for unit in _sharded(model):
        # Gradients are summed, never averaged: the loss is divided by the global number of tokens. Both lines, or
        # groups of one process would divide nevertheless.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def sharded_units(model: Transformer) -> list[nn.Module]:
    """What is gathered at a time: the layers, and the modules of multi-token prediction."""
    extra = [] if model.multi_token is None else list(model.multi_token.layers.values())
    return [*model.layers.values(), *extra]


def wide_units(model: Transformer, layer: nn.Module) -> list[nn.Module]:
    """What of a layer is gathered by itself, as it computes in another dtype than the rest."""
    if model.dtype == torch.float32:
        return []
    return [module for module in layer.modules() if getattr(module, "full_precision", False)]


def synchronise_gradients(model: nn.Module, now: bool) -> None:
    """Whether the backwards to come sum gradients over processes; without, they add up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def release(model: nn.Module) -> None:
    """Free weights that a forward without a backward has left gathered: parameters are the sharded ones again."""
    for module in _sharded(model):
        module.reshard()


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
