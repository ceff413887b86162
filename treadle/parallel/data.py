"""Processes that see different rows: FSDP, HSDP and DDP, all by PyTorch's `fully_shard` on one mesh.

Weights are sharded over shard x context and copied over `replicate`. Plain data parallelism (DDP) is the mesh whose
shard size is one, and no engine of its own: so precision, clipping, checkpoints and optimizers see one kind of
parameter, and no layout needs its own tests of those. The price is a copy of a layer's weights in the compute dtype,
freed with the layer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
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
from torch.distributed.tensor import Shard

from treadle.nn.moe import MoE
from treadle.nn.transformer import Transformer
from treadle.parallel.config import ParallelConfig
from treadle.parallel.expert import experts_of
from treadle.parallel.mesh import Mesh


def shard_data(model: Transformer, mesh: Mesh, config: ParallelConfig) -> None:
    """Shard each layer, and what is left (embedding, last norm, head) with the model itself. A no-op for one process.

    The model may be on the meta device; activation checkpointing and compilation come before. Weights are gathered in
    the compute dtype, but for modules that compute in float32 (`full_precision`); gradients are summed in float32.
    """
    # One process needs no sharding, but tensor parallelism leaves sums over its own processes to it.
    alone = mesh.fsdp is not None and mesh.fsdp.size() == 1 and mesh.tensor is None
    if mesh.fsdp is None or (alone and mesh.pipeline is not None and not config.cpu_offload):
        return
    # Where many micro-batches are under way, freeing weights after each of them would gather them that many times.
    freed = config.reshard == "after_forward" or (config.reshard == "auto" and mesh.pipeline is None)
    options: dict[str, Any] = {"mesh": mesh.fsdp, "reshard_after_forward": freed}
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu")
    # Casts are explicit in the blocks: what flows through them is not to be touched here.
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in sharded_units(model):
        for moe in layer.modules():
            if mesh.expert is not None and isinstance(moe, MoE):
                _shard_experts(moe, mesh, {**options, "mp_policy": narrow})
        for module in wide_units(model, layer):
            fully_shard(module, mp_policy=wide, **options)
        fully_shard(layer, mp_policy=narrow, **options)
    # The head is used after `hidden` has returned (and the embedding again, by multi-token prediction), so the root's
    # weights stay until the backward frees them; `release` does it where there is none.
    fully_shard(model, mp_policy=narrow, **{**options, "reshard_after_forward": False})
    register_fsdp_forward_method(model, "hidden" if mesh.pipeline is None else "segment")
    for unit in _sharded(model):
        # Gradients are summed, never averaged: the loss is divided by the global number of tokens. Both lines, or
        # groups of one process would divide nevertheless.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _shard_experts(moe: MoE, mesh: Mesh, options: dict[str, Any]) -> None:
    """Shard what expert parallelism has left of the experts here: gathered together, and together with no others."""

    def placement(parameter: nn.Parameter) -> Shard:
        # Whole experts, or else rows of each; see `check_layout`.
        return Shard(0 if parameter.to_local().shape[0] % mesh.expert_shards == 0 else 1)  # type: ignore[attr-defined]

    units: list[nn.Module] = [*experts_of(moe)]
    fully_shard(units, shard_placement_fn=placement, **{**options, "mesh": mesh.expert_fsdp})


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


def accumulate_gradients(model: nn.Module) -> None:
    """The backwards to come add up gradients locally, until `reduce_gradients`, and free no weights."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(False)
        model.set_reshard_after_backward(False)
        model.set_requires_gradient_sync(False)


def reduce_gradients(model: nn.Module) -> None:
    """Sum what has been added up over processes: FSDP's part of a last backward, where none knows to be the last.

    Private in PyTorch, whose own pipeline stages do the same.
    """
    if not isinstance(model, FSDPModule):
        return
    root: Any = fully_shard.state(model)  # type: ignore[attr-defined]
    groups: list[Any] = []
    for state in root._state_ctx.all_states:
        found = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        groups += [group for group in found if group is not None]
    model.set_is_last_backward(True)
    model.set_reshard_after_backward(True)
    model.set_requires_gradient_sync(True)
    for group in groups:
        group.post_backward()
    root._root_post_backward_final_callback()


def without_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Inference mode, but for a sharded model: buffers that its first forward makes are to be trained with later."""
    return torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode()


def release(model: nn.Module) -> None:
    """Free weights that a forward without a backward has left gathered: parameters are the sharded ones again."""
    for module in _sharded(model):
        module.reshard()


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
