"""One matmul per group of rows, all at once: what the experts of a mixture compute.

The only place that knows PyTorch's grouped matmul. It is called inside operators of our own, because PyTorch's has
fake tensors for bf16 only (2.13), wants gradients without broadcast strides, and leaves rows after the last group
unwritten. No size of a group is ever read by the host, so it compiles and can be captured.

N rows, E groups, I inputs, O outputs.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Literal["auto", "grouped", "loop"]

# Public since torch 2.10; the private name has existed since 2.8.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, *, tail: bool = False, implementation: Implementation = "auto"
) -> Tensor:
    """y = x W_e^T for each row x of group e.  -> y_NO in the dtype of x

    weight_EOI: in the dtype of x. ends_E: int32, where each group of rows ends; it begins where the one before ends.
    tail: there may be rows after the last group; they come out as zeros and get no gradient.
    implementation: `grouped` is PyTorch's grouped matmul, `loop` a matmul per group (any dtype and size, but it reads
        the ends on the host), `auto` the first where it can be used. Raises ValueError when `grouped` cannot.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation '{implementation}'; known: {', '.join(get_args(Implementation))}")
    reason = unsupported(x_NI, weight_EOI) if implementation != "loop" else None
    if implementation == "grouped" and reason is not None:
        raise ValueError(f"the grouped matmul cannot be used here: {reason}; use implementation 'loop'")
    if implementation == "loop" or reason is not None:
        return _loop(x_NI, weight_EOI, ends_E)
    return torch.ops.treadle.grouped_linear(x_NI, weight_EOI, ends_E, tail)  # type: ignore[no-any-return]


def grouped_weight_gradient(dy_NO: Tensor, x_NI: Tensor, ends_E: Tensor, *, implementation: Implementation) -> Tensor:
    """The gradient of `grouped_linear` by its weight, by itself.  -> dweight_EOI in the dtype of x

    implementation: that of the forward; both of its sizes decide what `auto` is.
    """
    sizes_1OI = x_NI.new_empty(1, dy_NO.shape[1], x_NI.shape[1], device="meta")
    if implementation != "loop" and unsupported(x_NI, sizes_1OI) is None:
        return torch.ops.treadle.grouped_linear_weight_grad(dy_NO, x_NI, ends_E)  # type: ignore[no-any-return]
    ends = ends_E.tolist()
    return torch.stack([dy_NO[a:b].t() @ x_NI[a:b] for a, b in zip([0, *ends], ends, strict=False)])


def unsupported(x_NI: Tensor, weight_EOI: Tensor) -> str | None:
    """Why PyTorch's grouped matmul cannot take these; None if it can."""
    if _grouped_mm is None:
        return f"PyTorch {torch.__version__} has none"
    if x_NI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in bf16, fp16 or fp32, not {x_NI.dtype}"
    for size in weight_EOI.shape[1:]:
        if size * x_NI.element_size() % 16:
            return f"a dimension of {size} {x_NI.dtype} numbers is no multiple of 16 bytes"
    return None


def _loop(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The definition."""
    ends = ends_E.tolist()
    pieces = [
        F.linear(x_NI[start:end], weight_OI)
        for start, end, weight_OI in zip([0, *ends], ends, weight_EOI.unbind(), strict=False)
    ]
    pieces.append(x_NI.new_zeros(x_NI.shape[0] - ends[-1], weight_EOI.shape[1]))
    return torch.cat(pieces)


def _rows(x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
    if x_NI.shape[0] == 0:  # all experts here idle, of those that live apart
        return x_NI.new_empty(0, weight_EIO.shape[2])
    y_NO: Tensor = _grouped_mm(x_NI.contiguous(), weight_EIO, offs=ends_E)
    if tail:
        y_NO.masked_fill_((torch.arange(y_NO.shape[0], device=y_NO.device) >= ends_E[-1])[:, None], 0)
    return y_NO


@torch.library.custom_op("treadle::grouped_linear", mutates_args=())
def _forward(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
    return _rows(x_NI, weight_EOI.transpose(1, 2), ends_E, tail)


@torch.library.custom_op("treadle::grouped_linear_input_grad", mutates_args=())
def _input_grad(dy_NO: Tensor, weight_EOI: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
    return _rows(dy_NO, weight_EOI, ends_E, tail)


@torch.library.custom_op("treadle::grouped_linear_weight_grad", mutates_args=())
def _weight_grad(dy_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    if x_NI.shape[0] == 0:
        return dy_NO.new_zeros(ends_E.shape[0], dy_NO.shape[1], x_NI.shape[1])
    dweight_EOI: Tensor = _grouped_mm(dy_NO.contiguous().t(), x_NI.contiguous(), offs=ends_E)
    return dweight_EOI


@_forward.register_fake
def _(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])


@_input_grad.register_fake
def _(dy_NO: Tensor, weight_EOI: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
    return dy_NO.new_empty(dy_NO.shape[0], weight_EOI.shape[2])


@_weight_grad.register_fake
def _(dy_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    return dy_NO.new_empty(ends_E.shape[0], dy_NO.shape[1], x_NI.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    x_NI, weight_EOI, ends_E, ctx.tail = inputs
    ctx.save_for_backward(x_NI, weight_EOI, ends_E)


def _backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
    x_NI, weight_EOI, ends_E = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx_NI = torch.ops.treadle.grouped_linear_input_grad(dy_NO, weight_EOI, ends_E, ctx.tail) if need_x else None
    dweight_EOI = torch.ops.treadle.grouped_linear_weight_grad(dy_NO, x_NI, ends_E) if need_weight else None
    return dx_NI, dweight_EOI, None, None


_forward.register_autograd(_backward, setup_context=_save)
