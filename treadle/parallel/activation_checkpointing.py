"""Activations: what is kept for the backward, where. The rest is recomputed (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed._functional_collectives
import torch.distributed._symmetric_memory
from pydantic import Field, PositiveInt
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import treadle.attention.flash4
import treadle.attention.ring
import treadle.attention.tilelang
import treadle.kernels.grouped_linear  # noqa: F401  define operators below
from treadle.config import Kind


class CheckpointingConfig(Kind):
    """Base: what of a layer is kept. The bare name stands for its defaults."""


class NoneConfig(CheckpointingConfig):
    """Everything that the backward reads."""

    kind: Literal["none"] = "none"


class SelectiveConfig(CheckpointingConfig):
    """Attention outputs, sums over processes and some of the matmuls; all else is recomputed."""

    kind: Literal["selective"] = "selective"
    matmuls: PositiveInt | None = Field(2, description="keep the first of every so many matmuls; null: none")


class FullConfig(CheckpointingConfig):
    """The input of a layer; all of its inside is recomputed."""

    kind: Literal["full"] = "full"
    every: PositiveInt = Field(1, description="recompute the first of every so many layers, keep all of the others")
    offload: bool = Field(False, description="what is kept waits in host memory")


class BudgetConfig(CheckpointingConfig):
    """What is dearest to recompute, for so much memory. The compiler chooses, so it needs `training.compile`."""

    kind: Literal["budget"] = "budget"
    share: float = Field(0.5, ge=0, le=1, description="of what a compiled layer would keep; 0: its input alone, 1: all")


class OffloadConfig(CheckpointingConfig):
    """Everything, in host memory."""

    kind: Literal["offload"] = "offload"


def offloads(config: CheckpointingConfig) -> bool:
    """Whether what is kept waits in host memory."""
    return isinstance(config, OffloadConfig) or (isinstance(config, FullConfig) and config.offload)


# What is dear to recompute: attention in each of its forms. Flex is not among them: kept while its block mask is
# recomputed, its compiled backward reads wild addresses (torch 2.11 on CUDA).
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.treadle.ring_attention.default,
    torch.ops.treadle.flash4.default,
    torch.ops.treadle.causal_attention_tilelang.default,
}
# What was summed over the processes that share a matrix: small, since each has its tokens only, and dear to send again.
_SUMS = {
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops.symm_mem.fused_matmul_reduce_scatter.default,
}
_MATMULS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.treadle.grouped_linear.default,
}

# FSDP marks what it does for the profiler, and within a layer (experts, a router in fp32) not as often in the
# recomputation as in the forward, which would be an error.
SAC_IGNORED_OPS |= {
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
}


def apply_activation_checkpointing(layers: nn.ModuleDict, config: CheckpointingConfig, *, random: bool = False) -> None:
    """Make layers recompute in the backward what is not kept. Wraps `forward` in place; parameter names stay.

    Layers are told apart by their names, their numbers in the whole stack: the same ones in each layout. A budget is
    the compiler's to keep (`compile_layers`), and host memory comes last (`offload_activations`).
    """
    if not isinstance(config, SelectiveConfig | FullConfig):
        return
    # Only what fine-tuning adds may have dropout; elsewhere no random state needs to be replayed.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if isinstance(config, SelectiveConfig):  # one object for all layers, which share what is compiled
        options["context_fn"] = partial(_selective_contexts, config.matmuls)
    for name, layer in layers.items():
        if isinstance(config, SelectiveConfig) or int(name) % config.every == 0:
            layer.forward = _recomputed(layer.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A function of its own and no functools.partial: the compiler starts at a Python frame that is not PyTorch's, and
    # inside `checkpoint` it is switched off, so that a partial would leave the layer uncompiled without a word.
    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return recomputed


def _selective_contexts(matmuls: int | None) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy(matmuls))


def _policy(matmuls: int | None) -> Callable[..., CheckpointPolicy]:
    # Forward and recomputation see the same sequence of matmuls, and each must decide alike: count them apart.
    seen = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in _ATTENTION or operation in _SUMS or getattr(operation, "_opname", "") == "_varlen_attn":
            return CheckpointPolicy.MUST_SAVE
        if matmuls is not None and operation in _MATMULS:
            before = seen[context.is_recompute]
            seen[context.is_recompute] += 1
            if before % matmuls == 0:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
