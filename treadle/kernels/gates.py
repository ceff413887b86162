"""Gated activations of a gate and its companion, that lie side by side: act(gate) * up.

N rows (of all leading dimensions), F numbers of each of the two.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from treadle.kernels.operation import Floor, Gradient, Operation, Shape, nbytes

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid"]
GatedActivation = Literal[Activation, "clamped_silu"]


def gated_activation(x: Tensor, activation: GatedActivation) -> Tensor:
    """activation(gate) * up, for the two halves of x.  x_..2F -> y_..F

    `clamped_silu` is GPT-OSS's (arXiv:2508.10925): with the gate up to 7 and the other in -7 ... 7,
    gate * sigmoid(1.702 * gate) * (up + 1).
    """
    if GATED.worthwhile(x, activation) or (torch.compiler.is_compiling() and x.is_cuda):
        return _Gated.apply(x, activation)  # type: ignore[no-any-return]
    return _gated(x, activation)


def activate(x: Tensor, name: Activation) -> Tensor:
    """Apply an activation. `gelu` is exact (erf), `gelu_tanh` its tanh form, `relu2` ReLU squared (2109.08668)."""
    match name:
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "sigmoid":
            return torch.sigmoid(x)
    raise ValueError(f"unknown activation '{name}'; known: {', '.join(get_args(Activation))}")


def _gated(x: Tensor, activation: GatedActivation) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    if activation == "clamped_silu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return activate(gate, activation) * up


class _Gated(autograd.Function):
    """In compiled code only the backward is an operator: there the compiler reads each half twice to write both
    gradients side by side. The forward it does well, and again in the backward, so that nothing but x is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: GatedActivation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        if torch.compiler.is_compiling():
            return _gated(x, activation)
        return torch.ops.treadle.gated_activation(x, activation)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return torch.ops.treadle.gated_activation_backward(grads[0], *ctx.saved_tensors, ctx.activation), None


ALL: tuple[GatedActivation, ...] = (*get_args(Activation), "clamped_silu")
# The first number picks the activation.
CHECKED = (*((i, 5, 3, 2 * 200) for i in range(len(ALL))), (ALL.index("silu"), 2, 2 * 4096))
TIMED = tuple((ALL.index("silu"), 16384, 2 * dim) for dim in (4096, 8192, 14336))


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return 2 * torch.randn(*shape[1:], dtype=dtype, device=device), ALL[shape[0]]


def _backward_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, activation = _arguments(shape, dtype, device)
    return torch.randn_like(x[..., ::2]).contiguous(), x, activation


GATED = Operation(
    name="gated_activation",
    schema="(Tensor x, str activation) -> Tensor",
    module=__name__,
    reference=_gated,
    fake=lambda x, activation: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    floor=lambda x, activation: Floor(1.5 * nbytes(x), 3 * x.numel()),
    arguments=_arguments,
    checked=CHECKED,
    timed=TIMED,
)

Operation(
    name="gated_activation_backward",
    schema="(Tensor dy, Tensor x, str activation) -> Tensor",
    module=__name__,
    reference=Gradient(lambda dy, x, activation: (lambda x: _gated(x, activation), (x,), dy)),
    fake=lambda dy, x, activation: x.new_empty(x.shape),
    floor=lambda dy, x, activation: Floor(2.5 * nbytes(x), 6 * x.numel()),
    arguments=_backward_arguments,
    checked=CHECKED,
    timed=TIMED,
)
