"""Cross entropy where each process has the scores of some of the vocabulary: no process ever holds a whole row of them.

As `treadle.kernels.linear_cross_entropy`, in chunks of tokens, and with a chunk's gradient formed in the place of its
logits. Of each token the processes exchange three numbers: the largest logit, the sum of exponentials, and the target's
logit, which one of them has.

T tokens, C tokens of a chunk, D model dim, V vocabulary entries of this process.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, autograd

from treadle.kernels.linear_cross_entropy import IGNORED, add_outer_products, chunk_tokens
from treadle.parallel.collectives import Peers

ELSEWHERE = -1  # a target that another process has the score of


def vocabulary_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    peers: Peers,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, the same on all processes. Collective.

    x_TD, targets_T: the same on all processes; the gradient of x is a part of a sum over them. weight_VD: the rows of
    the vocabulary that are here, rank by rank.
    """
    chunk = chunk or chunk_tokens(x_TD.device, weight_VD.shape[0])
    if not torch.is_grad_enabled():  # a Function does not see no_grad: it would form the gradients all the same
        x_TD, weight_VD = x_TD.detach(), weight_VD.detach()
    here_T = targets_T - peers.rank * weight_VD.shape[0]
    # A difference may well be -100: what others have is ELSEWHERE.
    here_T = torch.where((here_T >= 0) & (here_T < weight_VD.shape[0]), here_T, ELSEWHERE)
    targets_T = torch.where(targets_T == IGNORED, IGNORED, here_T)
    return _VocabularyCrossEntropy.apply(x_TD, weight_VD, targets_T, peers, (softcap, z_loss, smoothing), chunk)  # type: ignore[no-any-return]


class _VocabularyCrossEntropy(autograd.Function):
    """Gradients are formed in the forward, where the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        peers: Peers,
        options: tuple[Any, ...],
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        (softcap, z_loss, smoothing), group = options, peers.name
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        spread = smoothing / (peers.size * weight_VD.shape[0])  # on each entry of the vocabulary
        cast_VD = weight_VD.to(x_TD.dtype)
        need_x, need_weight = ctx.needs_input_grad[:2]
        dx_TD = torch.empty_like(x_TD) if need_x else None
        dweight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=x_TD.device) if need_weight else None
        loss = torch.zeros((), dtype=wide, device=x_TD.device)
        penalty = torch.zeros_like(loss)
        statistics, gradient = _steps(x_TD.device.type)
        for start in range(0, x_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            targets_C, logits_CV = targets_T[rows], x_TD[rows] @ cast_VD.t()
            largest_C, sum_C, picked_C = statistics(logits_CV, targets_C, softcap, smoothing, spread)
            together_C = funcol.wait_tensor(funcol.all_reduce(largest_C, "max", group))
            sums_2C = torch.stack((sum_C * (largest_C - together_C).exp(), picked_C))
            sum_C, picked_C = funcol.wait_tensor(funcol.all_reduce(sums_2C, "sum", group)).unbind()
            lse_C, counts_C = together_C + sum_C.log(), targets_C != IGNORED
            chunk_penalty = torch.where(counts_C, z_loss * lse_C.square(), 0.0).sum()
            penalty += chunk_penalty
            loss += torch.where(counts_C, lse_C - picked_C, 0.0).sum() + chunk_penalty
            if not (need_x or need_weight):
                continue
            dlogits_CV = gradient(logits_CV, targets_C, lse_C, softcap, z_loss, smoothing, spread)
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
        dx_TD, dweight_VD = ctx.saved_tensors
        # In place: the saved gradients are this node's own and a second backward through it would be scaled twice.
        dx_TD = None if dx_TD is None else torch.mul(dx_TD, grads[0], out=dx_TD)
        dweight_VD = None if dweight_VD is None else dweight_VD.mul_(grads[0]).to(ctx.weight_dtype)
        return dx_TD, dweight_VD, None, None, None, None


def _capped(logits_CV: Tensor, softcap: float | None) -> Tensor:
    z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return z_CV if softcap is None else softcap * torch.tanh(z_CV / softcap)


def _statistics(
    logits_CV: Tensor, targets_C: Tensor, softcap: float | None, smoothing: float, spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest score, the sum of exponentials below it, and what of the target's score is here, smoothed."""
    z_CV = _capped(logits_CV, softcap)
    largest_C = z_CV.amax(-1)
    sum_C = (z_CV - largest_C[:, None]).exp().sum(-1)
    picked_C = z_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0]
    picked_C = torch.where(targets_C >= 0, picked_C, 0.0)
    return largest_C, sum_C, (1 - smoothing) * picked_C + spread * z_CV.sum(-1) if smoothing else picked_C


def _gradient(
    logits_CV: Tensor,
    targets_C: Tensor,
    lse_C: Tensor,
    softcap: float | None,
    z_loss: float,
    smoothing: float,
    spread: float,
) -> Tensor:
    """Of the logits that are here, in their dtype."""
    z_CV = _capped(logits_CV, softcap)
    scale_C1 = torch.where(targets_C != IGNORED, 1 + 2 * z_loss * lse_C, 0.0)[:, None]
    # Targets of others are negative, and so is what does not count.
    hit_CV = torch.arange(z_CV.shape[1], device=z_CV.device)[None, :] == targets_C[:, None]
    dz_CV = (z_CV - lse_C[:, None]).exp() * scale_C1 - hit_CV.to(z_CV.dtype) * (1 - smoothing)
    if smoothing:
        dz_CV = dz_CV - spread * (targets_C != IGNORED).to(dz_CV.dtype)[:, None]
    if softcap is not None:
        dz_CV = dz_CV * (1 - (z_CV / softcap).square())
    return dz_CV.to(logits_CV.dtype)


@functools.cache
def _steps(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """On a GPU each is compiled into one pass over the logits; on a CPU they run as they stand."""
    if device != "cuda":
        return _statistics, _gradient
    return torch.compile(_statistics, dynamic=False), torch.compile(_gradient, dynamic=False)
