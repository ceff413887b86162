"""A linear map with what follows it in one kernel: bias and activation, or the gated product of SwiGLU. Forward only.

N rows (of all leading dimensions), D inputs, F outputs.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels.gates import activate, gated_activation
from treadle.kernels.operation import Floor, Operation, Shape, nbytes

Epilogue = Literal["none", "relu2", "gelu_tanh", "silu", "swiglu"]


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: Epilogue = "none") -> Tensor:
    """epilogue(x @ weight.T + bias); of `swiglu`, weight has the rows of the gate and then of its companion.

    x_..D, weight_FD, bias_F -> y_..F; of swiglu weight_2FD, bias_2F. Where gradients are recorded, the definition.
    """
    if not torch.is_grad_enabled() and FUSED_LINEAR.worthwhile(x, weight, bias, epilogue):
        return torch.ops.treadle.fused_linear(x, weight, bias, epilogue)  # type: ignore[no-any-return]
    return _fused_linear(x, weight, bias, epilogue)


def _fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if epilogue == "none":
        return y
    return gated_activation(y, "silu") if epilogue == "swiglu" else activate(y, epilogue)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if epilogue == "swiglu" else 1))


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    which, biased, *rows, D, features = shape
    epilogue = ALL[which]
    outputs = features * (2 if epilogue == "swiglu" else 1)
    x = torch.randn(*rows, D, dtype=dtype, device=device)
    weight = torch.randn(outputs, D, dtype=dtype, device=device) / D**0.5
    return x, weight, torch.randn(outputs, device=device) if biased else None, epilogue


ALL: tuple[Epilogue, ...] = ("none", "relu2", "gelu_tanh", "silu", "swiglu")

FUSED_LINEAR = Operation(
    name="fused_linear",
    schema="(Tensor x, Tensor weight, Tensor? bias, str epilogue) -> Tensor",
    module=__name__,
    reference=_fused_linear,
    fake=_fake,
    floor=lambda x, weight, bias, epilogue: Floor(
        nbytes(x, weight, bias) + _fake(x, weight, bias, epilogue).numel() * x.element_size(),
        2 * x.numel() * weight.shape[0],
    ),
    arguments=_arguments,
    checked=(
        *((i, 1 - i // 4, 2, 50, 72, 136) for i in range(len(ALL))),
        (0, 0, 300, 256, 520),
        (4, 0, 129, 1024, 256),
    ),
    timed=((0, 0, 8192, 4096, 4096), (3, 1, 8192, 4096, 14336), (4, 0, 8192, 4096, 14336)),
)
