"""What a GPU does otherwise than the CPU that a dry run pretends on: operations with the memory of CUDA's kernels.

PyTorch cannot follow a backward on fake CUDA tensors where there is no GPU, so a dry run's tensors are fake CPU ones,
and the few places where Treadle or PyTorch choose by device are replaced, for as long as `on_cuda` lasts.

B batch, S sequence, T keys, H heads, G key-value heads, K head dim, V value dim.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from treadle.attention import dispatch
from treadle.attention.padding import one_dim
from treadle.kernels import linear_cross_entropy
from treadle.memory.kernels import own_kernels
from treadle.memory.live import WORKSPACES, LiveMemory
from treadle.parallel import activation_checkpointing, vocabulary, weight_gradients
from treadle.parallel.expert import Exchange


@contextmanager
def on_cuda(meter: LiveMemory, backend: Any, *, compiled: bool) -> Iterator[None]:
    """Treadle as it would run on a GPU. backend: what compiles. compiled: the layers, and so their norms."""
    fused = {"backend": backend, "dynamic": False}
    shared = tuple(torch.compile(step, **fused) for step in (vocabulary._statistics, vocabulary._gradient))

    def add(total_VD: Tensor, dlogits_CV: Tensor, x_CD: Tensor) -> None:  # one kernel, nothing beside its operands
        meter.costs.flops += 2 * dlogits_CV.numel() * x_CD.shape[1] * meter.counting

    elements = linear_cross_entropy.CHUNK_ELEMENTS
    patches: list[Any] = [
        own_kernels(),
        mock.patch.object(dispatch, "choose", _stand_in),
        mock.patch.dict(dispatch.BACKENDS, {"stand-in": _Attention}),  # type: ignore[dict-item]
        mock.patch.dict(elements, {"cpu": elements["cuda"]}),
        mock.patch.object(linear_cross_entropy, "_chunk_step", _always(_in_place)),
        mock.patch.object(vocabulary, "_steps", _always(shared)),
        *(mock.patch.object(module, "add_outer_products", add) for module in (linear_cross_entropy, weight_gradients)),
        mock.patch.object(
            activation_checkpointing,
            "_ATTENTION",
            {*activation_checkpointing._ATTENTION, torch.ops.treadle.planned_attention.default},
        ),
    ]
    if not compiled:
        patches.append(mock.patch.object(F, "rms_norm", _rms_norm))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _stand_in(*_: Any) -> str:
    return "stand-in"


def _in_place(logits_CV: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `cross_entropy_rows` keeps: the gradient lies where the logits were."""
    return logits_CV.new_zeros((), dtype=torch.float32), logits_CV.new_zeros((), dtype=torch.float32), logits_CV


def _always(value: Any) -> Any:
    return lambda *_: value


@contextmanager
def even_load() -> Iterator[None]:
    """Experts that live apart get equally many rows from each process: fake counts cannot say otherwise."""

    def rows(self: Exchange, rows_ND: Tensor, *_: Tensor) -> list[list[int]]:
        size = self.group.size()
        each, left = divmod(rows_ND.shape[0], size)
        share = [each + (number < left) for number in range(size)]
        return [share, [share[0]] * size]

    with mock.patch.object(Exchange, "rows", rows):
        yield


class _Attention:
    """Any of the fused kernels: nothing of size S x T, and the log of the softmax's sum is kept with the output."""

    @staticmethod
    def attend(
        q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, facts: Any, context: Any, sinks_H: Tensor | None = None
    ) -> Tensor:
        V = v_BTGV.shape[-1]
        if facts.softcap is None and max(q_BSHK.shape[-1], V) <= 256:
            q_BSHK, k_BTGK, v_BTGV = one_dim(q_BSHK, k_BTGK, v_BTGV)
        out_BSHV, lse_BHS = torch.ops.treadle.planned_attention(q_BSHK, k_BTGK, v_BTGV, facts.window or 0)
        if sinks_H is not None:
            out_BSHV = out_BSHV * torch.sigmoid(lse_BHS - sinks_H[:, None]).mT[..., None].to(out_BSHV.dtype)
        return out_BSHV[..., :V]  # type: ignore[no-any-return]


@torch.library.custom_op("treadle::planned_attention", mutates_args=())
def _attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, window: int) -> tuple[Tensor, Tensor]:
    raise RuntimeError("this stands for attention in a dry run, and computes nothing")


@torch.library.custom_op("treadle::planned_attention_backward", mutates_args=())
def _attention_backward(
    dout_BSHV: Tensor, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, out_BSHV: Tensor, lse_BHS: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("this stands for attention in a dry run, and computes nothing")


@_attention.register_fake
def _(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, window: int) -> tuple[Tensor, Tensor]:
    B, S, H, _K = q_BSHK.shape
    return q_BSHK.new_empty(B, S, H, v_BTGV.shape[3]), q_BSHK.new_empty(B, H, S, dtype=torch.float32)


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.window = inputs[3]


def _gradients(ctx: Any, dout_BSHV: Tensor, dlse_BHS: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.treadle.planned_attention_backward
    return *backward(dout_BSHV.contiguous(), *ctx.saved_tensors, ctx.window), None


_attention.register_autograd(_gradients, setup_context=_save)


def _accumulators(dout: Tensor, q_BSHK: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int) -> int:
    """The gradient of queries is added up in float32, and each query has one number more."""
    return 4 * (q_BSHK.numel() + lse.numel())


WORKSPACES[torch.ops.treadle.planned_attention_backward.default] = _accumulators


@register_flop_formula(torch.ops.treadle.planned_attention)
def _attention_flops(q: Any, k: Any, v: Any, window: int, **_: Any) -> int:
    """Of the visible pairs: the causal half, or a band."""
    B, S, H, K = q
    seen = S * min(k[1], window) if window else S * k[1] // 2
    return 2 * B * H * seen * (K + v[3])  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.treadle.planned_attention_backward)
def _attention_backward_flops(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, window: int, **_: Any) -> int:
    return 5 * _attention_flops(q, k, v, window) // 2


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _RMSNorm.apply(x, weight, len(tuple(shape)))  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    """CUDA's fused norm: what it keeps is its input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-dims], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None
