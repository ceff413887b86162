"""The head's matmul and the cross entropy as one operation, in chunks of tokens: the logits of a batch never exist.

With a vocabulary of 128k, the logits of 32k tokens would take 8 GiB in bf16 and their gradient as much again. Here a
chunk's logits become its gradient in place, the two gradient products are formed at once, and the chunk is dropped.

T tokens, C tokens of a chunk, D model dim, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd

Step = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]

IGNORED = -100  # the target that no loss counts, as in torch's cross_entropy
# Logits of a chunk. On a GPU large enough for the matmuls to run at full speed (1 GiB in bf16), on a CPU small enough
# for the chain of elementwise passes to stay in cache.
CHUNK_ELEMENTS = {"cuda": 1 << 29, "cpu": 1 << 20}


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(x W^T)[target] + z_loss * logsumexp^2; and its second part alone, detached.

    x_TD: in the compute dtype; the products are formed in it, the softmax in float32.
    weight_VD: any float dtype; its gradient is accumulated in float32.
    targets_T: int64, -100 where a token does not count.
    softcap: logits become softcap * tanh(logits / softcap) first.
    z_loss: weight of the squared log partition function (PaLM, arXiv:2204.02311).
    smoothing: share of each target that is spread evenly over the vocabulary (label smoothing, arXiv:1512.00567).
    chunk: tokens at a time; None picks one by memory. Returns float32 scalars (float64 if x is).
    """
    one = _chunk_step(x_TD.device.type)

    def step(logits_CV: Tensor, targets_C: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        return one(logits_CV, targets_C, softcap, z_loss, smoothing, need_gradient)

    return chunked(x_TD, weight_VD, targets_T, step, chunk)


def chunked(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, step: Step, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of a loss over chunks of tokens, and of a part of it (detached), without holding all logits.

    step: (logits_CV, targets_C, whether their gradient is needed) -> loss of a chunk, that part of it, and the gradient
    of the logits in their dtype, which may lie in their place.
    """
    chunk = chunk or chunk_tokens(x_TD.device, weight_VD.shape[0])
    if not torch.is_grad_enabled():  # a Function does not see no_grad: it would form the gradients all the same
        x_TD, weight_VD = x_TD.detach(), weight_VD.detach()
    return _Chunked.apply(x_TD, weight_VD, targets_T, step, chunk)  # type: ignore[no-any-return]


def chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """Tokens at a time: a power of two, so that a batch divides into equal chunks of whole matmul tiles."""
    fits = CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // vocabulary
    return max(64, 1 << max(0, fits.bit_length() - 1))


class _Chunked(autograd.Function):
    """Gradients are formed in the forward, where the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, step: Step, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        cast_VD = weight_VD.to(x_TD.dtype)
        need_x, need_weight = ctx.needs_input_grad[:2]
        dx_TD = torch.empty_like(x_TD) if need_x else None
        dweight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=x_TD.device) if need_weight else None
        loss = torch.zeros((), dtype=wide, device=x_TD.device)
        penalty = torch.zeros_like(loss)
        need = need_x or need_weight
        for start in range(0, x_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_CV = x_TD[rows] @ cast_VD.t()
            chunk_loss, chunk_penalty, dlogits_CV = step(logits_CV, targets_T[rows], need)
            loss += chunk_loss
            penalty += chunk_penalty
            if dx_TD is not None:
                torch.mm(dlogits_CV, cast_VD, out=dx_TD[rows])
            if dweight_VD is not None:
                add_outer_products(dweight_VD, dlogits_CV, x_TD[rows])
        ctx.save_for_backward(dx_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(penalty)
        return loss, penalty

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        dx_TD, dweight_VD = ctx.saved_tensors
        # In place: the saved gradients are this node's own and a second backward through it would be scaled twice.
        dx_TD = None if dx_TD is None else torch.mul(dx_TD, scale, out=dx_TD)
        dweight_VD = None if dweight_VD is None else dweight_VD.mul_(scale).to(ctx.weight_dtype)
        return dx_TD, dweight_VD, None, None, None


def add_outer_products(total_VD: Tensor, dlogits_CV: Tensor, x_CD: Tensor) -> None:
    """total += dlogits^T x, summed in the wide dtype of `total`: how a matmul's weight gets its gradient."""
    if dlogits_CV.dtype == total_VD.dtype:
        total_VD.addmm_(dlogits_CV.t(), x_CD)
    elif dlogits_CV.device.type == "cuda":
        torch.addmm(total_VD, dlogits_CV.t(), x_CD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD += dlogits_CV.t() @ x_CD


def _loss_and_gradient(
    logits_CV: Tensor, targets_C: Tensor, softcap: float | None, z_loss: float, smoothing: float, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a chunk, its z-loss part, and the gradient of its logits in their dtype (the logits if not needed)."""
    z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    tanh_CV = None
    if softcap is not None:
        tanh_CV = torch.tanh(z_CV / softcap)
        z_CV = softcap * tanh_CV
    lse_C = torch.logsumexp(z_CV, dim=-1)
    counts_C = targets_C != IGNORED
    index_C1 = targets_C.clamp(min=0)[:, None]
    picked_C = z_CV.gather(1, index_C1)[:, 0]
    if smoothing:
        picked_C = torch.lerp(picked_C, z_CV.mean(-1), smoothing)
    penalty = torch.where(counts_C, z_loss * lse_C.square(), 0.0).sum()
    loss = torch.where(counts_C, lse_C - picked_C, 0.0).sum() + penalty
    if not need_gradient:
        return loss, penalty, logits_CV
    softmax_scale_C1 = torch.where(counts_C, 1 + 2 * z_loss * lse_C, 0.0)[:, None]
    dz_CV = (z_CV - lse_C[:, None]).exp_().mul_(softmax_scale_C1)
    hit_C1 = counts_C[:, None].to(dz_CV.dtype)
    if smoothing:
        dz_CV -= hit_C1 * (smoothing / z_CV.shape[1])
    dz_CV.scatter_add_(1, index_C1, hit_C1 * (smoothing - 1))
    if softcap is not None and tanh_CV is not None:
        dz_CV = dz_CV * (1 - tanh_CV.square())
    return loss, penalty, dz_CV.to(logits_CV.dtype)


@functools.cache
def _chunk_step(device: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """On a GPU one kernel that overwrites the logits (`cross_entropy_rows`); on a CPU the chain above."""
    if device != "cuda":
        return _loss_and_gradient
    from treadle.kernels.cross_entropy_rows import cross_entropy_rows  # Triton is where GPUs are

    return cross_entropy_rows
