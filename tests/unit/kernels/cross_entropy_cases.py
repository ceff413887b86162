"""The Triton kernel of the cross entropy in the interpreter, against PyTorch's in float64."""

import itertools

import interpreter  # noqa: F401  it has to come before Triton
import torch
import torch.nn.functional as F

from treadle.kernels import cross_entropy_rows as module


def error(softcap: float | None, z_loss: float, smoothing: float, dtype: torch.dtype) -> float:
    """Of loss, penalty and gradient: the largest, over the largest of what is right."""
    logits_CV, targets_C = torch.randn(5, 150).mul_(3).to(dtype), torch.tensor([0, 149, -100, 64, 7])
    exact_CV = logits_CV.double().requires_grad_()
    z_CV = exact_CV if softcap is None else softcap * torch.tanh(exact_CV / softcap)
    penalty = z_loss * z_CV.logsumexp(-1)[targets_C != -100].square().sum()
    loss = F.cross_entropy(z_CV, targets_C, reduction="sum", label_smoothing=smoothing) + penalty
    loss.backward()
    found = module.cross_entropy_rows(logits_CV, targets_C, softcap, z_loss, smoothing, True)
    right = loss.detach(), penalty.detach(), exact_CV.grad
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(found, right, strict=True)
    )


def main() -> None:
    torch.manual_seed(0)
    module.BLOCK = 64  # several blocks a row, and the last of them in part
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for case in itertools.product((None, 2.0), (0.0, 0.1), (0.0, 0.2)):
            worst = error(*case, dtype)
            print("ok" if worst < limit else "wrong", *case, dtype, f"{worst:.1e}", flush=True)


main()
