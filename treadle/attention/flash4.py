"""Attention through FlashAttention 4 (arXiv:2603.05451), where `flash-attn-4` is installed: on Hopper the fastest there
is, of whole rows and of packed documents, with and without a window.

It compiles a kernel for each head dim and kind of mask in about two seconds, at first use.

B batch, S sequence, T = B*S, H heads, G key-value heads, K head dim, V value dim.
"""

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from treadle.attention.context import AttentionContext
from treadle.attention.facts import AttentionFacts
from treadle.attention.flash import unreadable

LARGEST = 128  # of the head dims that it takes, those at which it was measured


def unsupported(
    q_BSHK: Tensor, facts: AttentionFacts, context: AttentionContext, value_dim: int | None = None
) -> str | None:
    if q_BSHK.device.type != "cuda":
        return f"it runs on CUDA only, the tensors are on {q_BSHK.device.type}"
    if (reason := _missing()) is not None:
        return reason
    if q_BSHK.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {q_BSHK.dtype}"
    for name in ("softcap", "alibi", "sinks"):
        if getattr(facts, name):
            return f"it has no {name} here"
    if (reason := unreadable(context)) is not None:
        return reason
    dims = (q_BSHK.shape[-1], value_dim or q_BSHK.shape[-1])
    if max(dims) > LARGEST or dims[0] % 8 or dims[1] % 8:
        return f"its head dims are multiples of 8 up to {LARGEST} here, not {dims[0]} and {dims[1]}"
    return None


def attend(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    facts: AttentionFacts,
    context: AttentionContext,
    sinks_H: Tensor | None = None,
) -> Tensor:
    scale, boundaries, S = facts.scale or q_BSHK.shape[-1] ** -0.5, context.cumulative_lengths_N, q_BSHK.shape[1]
    if context.documents_BS is None or boundaries is None:
        out_BSHV: Tensor = torch.ops.treadle.flash4(q_BSHK, k_BSGK, v_BSGV, None, S, scale, facts.window)[0]
        return out_BSHV
    flat = (x.flatten(0, 1) for x in (q_BSHK, k_BSGK, v_BSGV))
    out_THV = torch.ops.treadle.flash4(*flat, boundaries, context.max_length or S, scale, facts.window)[0]
    return out_THV.unflatten(0, q_BSHK.shape[:2])  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing() -> str | None:
    return _looked_up()


@functools.cache
def _looked_up() -> str | None:
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "it is not installed: pip install 'treadle[flash4]'"
    major, minor = torch.cuda.get_device_capability()
    return None if major in (9, 10) else f"it needs Hopper or Blackwell, not compute capability {major}.{minor}"


def _options(boundaries_N: Tensor | None, longest: int, scale: float, window: int | None) -> dict[str, Any]:
    """As both of the package's functions take them, which PyTorch calls too (`torch.nn.attention._fa4`)."""
    found: dict[str, Any] = {"softmax_scale": scale, "causal": window is None}
    if window is not None:
        found |= {"window_size_left": window - 1, "window_size_right": 0}
    if boundaries_N is not None:
        found |= {"cu_seqlens_q": boundaries_N, "cu_seqlens_k": boundaries_N}
        found |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return found


@torch.library.custom_op("treadle::flash4", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, boundaries_N: Tensor | None, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """-> out, and the log of the softmax's sum in float32. q_BSHK, or q_THK with boundaries of documents."""
    from flash_attn.cute.interface import _flash_attn_fwd

    options = _options(boundaries_N, longest, scale, window)
    out, log_sum = _flash_attn_fwd(q, k, v, return_lse=True, **options)[:2]
    return out, log_sum


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, boundaries_N: Tensor | None, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, out.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)


@torch.library.custom_op("treadle::flash4_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    boundaries_N: Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    options = _options(boundaries_N, longest, scale, window)
    dq, dk, dv = _flash_attn_bwd(q, k, v, out, dout, log_sum, **options)[:3]
    return dq, dk, dv


@_backward.register_fake
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, boundaries_N, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, boundaries_N)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *saved, boundaries_N = ctx.saved_tensors
    gradients = torch.ops.treadle.flash4_backward(dout, *saved, boundaries_N, *ctx.rest)
    return *gradients, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
