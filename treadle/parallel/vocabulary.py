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
from torch import Tensor

from treadle.kernels.linear_cross_entropy import IGNORED, chunked
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
    here_T = targets_T - peers.rank * weight_VD.shape[0]
    # A difference may well be -100: what others have is ELSEWHERE.
    here_T = torch.where((here_T >= 0) & (here_T < weight_VD.shape[0]), here_T, ELSEWHERE)
    targets_T = torch.where(targets_T == IGNORED, IGNORED, here_T)
    statistics, gradient = _steps(x_TD.device.type)
    spread = smoothing / (peers.size * weight_VD.shape[0])  # on each entry of the vocabulary

    def step(logits_CV: Tensor, targets_C: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        largest_C, sum_C, picked_C = statistics(logits_CV, targets_C, softcap, smoothing, spread)
        together_C = funcol.wait_tensor(funcol.all_reduce(largest_C, "max", peers.name))
        sums_2C = torch.stack((sum_C * (largest_C - together_C).exp(), picked_C))
        sum_C, picked_C = funcol.wait_tensor(funcol.all_reduce(sums_2C, "sum", peers.name)).unbind()
        lse_C, counts_C = together_C + sum_C.log(), targets_C != IGNORED
        penalty = torch.where(counts_C, z_loss * lse_C.square(), 0.0).sum()
        loss = torch.where(counts_C, lse_C - picked_C, 0.0).sum() + penalty
        if need_gradient:
            logits_CV = gradient(logits_CV, targets_C, lse_C, softcap, z_loss, smoothing, spread)
        return loss, penalty, logits_CV

    return chunked(x_TD, weight_VD, targets_T, step, chunk)


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
