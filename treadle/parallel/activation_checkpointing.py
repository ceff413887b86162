"""Activation checkpointing: trade recomputation in the backward for memory (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed._functional_collectives
import torch.distributed._symmetric_memory
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import treadle.attention.flash4
import treadle.attention.ring
import treadle.kernels.grouped_linear  # noqa: F401  define operators below

Mode = Literal["none", "selective", "full"]

# What is dear to recompute: attention in each of its forms. Matmuls are kept every other time. Flex is not among them:
# kept while its block mask is recomputed, its compiled backward reads wild addresses (torch 2.11 on CUDA).
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.treadle.ring_attention.default,
    torch.ops.treadle.flash4.default,
}
# What was summed over the processes that share a matrix: small, since each has its tokens only, and dear to send again.
_SUMS = {
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops.symm_mem.fused_matmul_reduce_scatter.default,
}
_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.treadle.grouped_linear.default}

# FSDP marks what it does for the profiler, and within a layer (experts, a router in fp32) not as often in the
# recomputation as in the forward, which would be an error.
SAC_IGNORED_OPS |= {
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
}


def apply_activation_checkpointing(layers: nn.ModuleDict, mode: Mode) -> None:
    """Make each layer recompute its inside in the backward. Wraps `forward` in place; parameter names stay.

    full: only a layer's input is kept. selective: also attention outputs, sums over processes and every second matmul.
    """
    if mode == "none":
        return
    for layer in layers.values():
        # Dropout does not exist here, so no random state needs to be replayed.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if mode == "selective":
            options["context_fn"] = _selective_contexts
        layer.forward = _recomputed(layer.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A function of its own and no functools.partial: the compiler starts at a Python frame that is not PyTorch's, and
    # inside `checkpoint` it is switched off, so that a partial would leave the layer uncompiled without a word.
    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return recomputed


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy())


def _policy() -> Callable[..., CheckpointPolicy]:
    # Forward and recomputation see the same sequence of matmuls, and each must decide alike: count them apart.
    seen = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in _ATTENTION or operation in _SUMS or getattr(operation, "_opname", "") == "_varlen_attn":
            return CheckpointPolicy.MUST_SAVE
        if operation in _MATMULS:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
