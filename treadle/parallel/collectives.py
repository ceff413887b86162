"""What the processes that share each matrix tell each other: differentiable, and the only place that does it.

Between layers each process has some of a sequence's tokens; inside a mixer or feed-forward all tokens, and some of the
heads or channels. So a matrix's input is gathered over the sequence, and its outputs, each a part of a sum, are summed
and scattered over it; the backward of the one is the other (Korthikanti et al. 2022, arXiv:2205.05198).

`gather_linear` and `linear_scatter` are these two together with their matmul, each as one operation on symmetric
memory, which moves the next tokens while it multiplies those that are here (async TP).

B batch, S sequence, I inputs, O outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.distributed._symmetric_memory
from torch import Tensor, autograd

from treadle.attention.context_parallel import arrived

# torch 2.12 has renamed them.
_gather: Any = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd
_scatter: Any = getattr(funcol, "reduce_scatter_single_autograd", None) or funcol.reduce_scatter_tensor_autograd

Later = Callable[[Tensor, Tensor], None]  # takes dy and x, of which a weight's gradient will be made

SEQUENCE = 1  # the dimension of x_BSD that is cut
FUSED = ("symm_mem::fused_all_gather_matmul", "symm_mem::fused_matmul_reduce_scatter")


@dataclass
class Peers:
    """The processes that share each matrix: one object that all modules of a model have.

    name: of the process group. asynchronous: whether matmuls and what they need from others are one operation.
    cut: whether the sequence is cut between layers. It is, but for sequences that do not divide: these pass through
    whole, without a gradient. Set by the model for each forward.
    """

    name: Any  # a str, which torch 2.13 has a type of its own for
    size: int
    rank: int
    asynchronous: bool = False
    cut: bool = True

    @property
    def fused(self) -> bool:
        return self.asynchronous and self.cut

    def share(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of what all of them have."""
        each = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * each, each)


def gather(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """The parts of all processes, one after the other. Backward: gradients are summed, each has that of its part."""
    # Waited for at once: an unfinished result must not enter a compiled region (torch 2.13 gets gradients wrong there).
    return arrived(_gather(x.contiguous(), dim, peers.name))


def sum_scatter(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """Each process's part of the sum. Backward: gradients are gathered."""
    return arrived(_scatter(x.contiguous(), "sum", dim, peers.name))


def total(x: Tensor, peers: Peers) -> Tensor:
    """The sum, on every process. Backward: the sum of what each process's part of the loss adds. For small tensors."""
    return gather(x[None], 0, peers).sum(0)


def enter(x_BSI: Tensor, peers: Peers) -> Tensor:
    """All tokens of what is cut over the sequence."""
    return gather(x_BSI, SEQUENCE, peers) if peers.cut else x_BSI


def leave(x_BSO: Tensor, peers: Peers) -> Tensor:
    """The sum over processes, cut over the sequence."""
    if peers.cut:
        return sum_scatter(x_BSO, SEQUENCE, peers)
    return funcol.wait_tensor(funcol.all_reduce(x_BSO.contiguous(), "sum", peers.name))


def gather_linear(peers: Peers, x_BSI: Tensor, weight_OI: Tensor, later: Later | None = None) -> Tensor:
    """`enter` and a matmul with this process's columns, as one operation. later: takes what the weight's gradient is
    made of, which is otherwise formed in the backward."""
    return _GatherLinear.apply(x_BSI.transpose(0, 1), weight_OI.to(x_BSI.dtype), peers.name, later).transpose(0, 1)  # type: ignore[no-any-return]


def linear_scatter(peers: Peers, x_BSI: Tensor, weight_OI: Tensor, later: Later | None = None) -> Tensor:
    """A matmul with this process's rows and `leave`, the same."""
    return _LinearScatter.apply(x_BSI.transpose(0, 1), weight_OI.to(x_BSI.dtype), peers.name, later).transpose(0, 1)  # type: ignore[no-any-return]


def not_fused_because(device: torch.device) -> str | None:
    """Why the fused operations cannot be used on a device; None if they can."""
    key = device.type.upper()
    if not all(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in FUSED):
        return f"PyTorch {torch.__version__} has no fused operations on symmetric memory for {device.type}"
    if device.type != "cuda":
        return None
    here = torch.cuda.current_device()
    others = [other for other in range(torch.cuda.device_count()) if other != here]
    if not all(torch.cuda.can_device_access_peer(here, other) for other in others):
        return "the GPUs of this machine cannot read each other's memory"
    return None


# The sequence comes first in these two: they gather and scatter the first dimension as it lies in memory.


class _GatherLinear(autograd.Function):
    """gather(x) W^T.  x_SBI (of this process), weight_OI -> y_SBO (of all tokens)"""

    @staticmethod
    def forward(ctx: Any, x_SBI: Tensor, weight_OI: Tensor, name: str, later: Later | None) -> Tensor:
        x_SBI, (y_SBO,) = torch.ops.symm_mem.fused_all_gather_matmul(x_SBI.contiguous(), [weight_OI.t()], 0, name)
        ctx.save_for_backward(x_SBI, weight_OI)
        ctx.name, ctx.later = name, later
        return y_SBO  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_SBI, weight_OI = ctx.saved_tensors
        dy_SBO = grads[0].contiguous()
        dx_SBI = torch.ops.symm_mem.fused_matmul_reduce_scatter(dy_SBO, weight_OI, "sum", 0, ctx.name)
        return dx_SBI, _weight_gradient(ctx, dy_SBO, x_SBI), None, None


class _LinearScatter(autograd.Function):
    """This process's part of the sum of x W^T.  x_SBI (all tokens), weight_OI -> y_SBO (of this process)"""

    @staticmethod
    def forward(ctx: Any, x_SBI: Tensor, weight_OI: Tensor, name: str, later: Later | None) -> Tensor:
        x_SBI = x_SBI.contiguous()
        ctx.save_for_backward(x_SBI, weight_OI)
        ctx.name, ctx.later = name, later
        y_SBO: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x_SBI, weight_OI.t(), "sum", 0, name)
        return y_SBO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_SBI, weight_OI = ctx.saved_tensors
        dy_SBO, (dx_SBI,) = torch.ops.symm_mem.fused_all_gather_matmul(grads[0].contiguous(), [weight_OI], 0, ctx.name)
        return dx_SBI, _weight_gradient(ctx, dy_SBO, x_SBI), None, None


def _weight_gradient(ctx: Any, dy_SBO: Tensor, x_SBI: Tensor) -> Tensor | None:
    if ctx.later is None:
        return dy_SBO.flatten(0, 1).t() @ x_SBI.flatten(0, 1)
    if ctx.needs_input_grad[1]:
        ctx.later(dy_SBO, x_SBI)
    return None


# Around the layers all processes have the same tensors and do the same with them. There a gradient is the same on all
# of them too, and not a part of a sum: these two lead into such a place, and out of it.


class Gathered(autograd.Function):
    """All processes' parts of a dimension. Backward: each takes its part of the gradient, where `gather` would sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.peers = dim, peers
        return gather(x, dim, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.peers.share(grads[0], ctx.dim), None, None


class Copied(autograd.Function):
    """x itself, for what each process then does differently. Backward: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return funcol.wait_tensor(funcol.all_reduce(grads[0].contiguous(), "sum", ctx.peers.name)), None
