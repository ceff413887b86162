"""One matmul per group of rows, all at once: what the experts of a mixture compute.

The only place that knows PyTorch's grouped matmul. Rows are sorted by group; no size of a group is ever read by the
host, so it compiles and can be captured.

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
    if not tail:
        return _grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends_E)  # type: ignore[no-any-return]
    # Rows after the last group are never written, neither in the output nor in the gradient of x: both pass a mask.
    inside_N1 = (torch.arange(x_NI.shape[0], device=x_NI.device) < ends_E[-1])[:, None]
    y_NO = _grouped_mm(torch.where(inside_N1, x_NI, 0), weight_EOI.transpose(1, 2), offs=ends_E)
    return torch.where(inside_N1, y_NO, 0)


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
