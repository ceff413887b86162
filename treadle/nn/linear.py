"""The linear layer and the embedding: fp32 master weights, computed in the dtype of what flows through them.

V vocabulary, D model dim, E experts, N rows, I inputs, O outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.kernels.grouped_linear import Implementation, grouped_linear


class Linear(nn.Module):
    """y = x W^T + b, with W cast to the dtype of x.

    parts: names (equal sizes) or {name: size} of the projections that are stored stacked in one weight, so that one
        matmul serves them all. Initialisation and Muon treat each part by itself.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = False, parts: Sequence[str] | Mapping[str, int] | None = None
    ):
        super().__init__()
        if parts is not None and not isinstance(parts, Mapping):
            parts = {name: outputs // len(parts) for name in parts}
        self.parts: dict[str, int] = dict(parts) if parts else {}
        if self.parts and sum(self.parts.values()) != outputs:
            raise ValueError(f"parts {self.parts} do not add up to {outputs} outputs")
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def product(self, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """x W^T alone, without bias. multiply: of x and W, where a matmul does more than that."""
        return multiply(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        parts = f", parts={self.parts}" if self.parts else ""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}{parts}"


class GroupedLinear(nn.Module):
    """One Linear per expert, on rows that are sorted by expert.  x_NI, ends_E -> y_NO

    active: how many of the experts a token meets (for the FLOPs count).
    parts: as in Linear, of each expert. Initialisation and Muon treat every part of every expert by itself.
    alone: the role that each expert's matrix would have if it stood alone.
    """

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        *,
        active: int,
        alone: Literal["column", "row", "replicate"],
        bias: bool = False,
        parts: Sequence[str] = (),
        implementation: Implementation = "auto",
    ):
        super().__init__()
        self.experts, self.active, self.alone, self.implementation = experts, active, alone, implementation
        self.parts: dict[str, int] = {name: outputs // len(parts) for name in parts}
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def forward(self, x_NI: Tensor, ends_E: Tensor, *, tail: bool = False) -> Tensor:
        """See `treadle.kernels.grouped_linear`. Rows of the tail, which no expert takes, come out as zeros."""
        return self.multiply(self.weight, self.bias, x_NI, ends_E, tail=tail)

    def multiply(
        self, weight_EOI: Tensor, bias_EO: Tensor | None, x_NI: Tensor, ends_E: Tensor, *, tail: bool
    ) -> Tensor:
        """The same with given weights: those of the experts that are here, where others live elsewhere."""
        y_NO = self.product(weight_EOI, x_NI, ends_E, tail)
        if bias_EO is None:
            return y_NO
        rows_N = torch.arange(x_NI.shape[0], device=x_NI.device)
        expert_N = torch.searchsorted(ends_E, rows_N, right=True)
        return y_NO + F.pad(bias_EO.to(x_NI.dtype), (0, 0, 0, 1))[expert_N]

    def product(self, weight_EOI: Tensor, x_NI: Tensor, ends_E: Tensor, tail: bool) -> Tensor:
        """The matmul alone, without bias."""
        weight_EOI = weight_EOI.to(x_NI.dtype)
        return grouped_linear(x_NI, weight_EOI, ends_E, tail=tail, implementation=self.implementation)

    def active_elements(self) -> int:
        """Of the matrices, without biases: what a token is multiplied with."""
        return self.weight.numel() // self.experts * self.active

    def extra_repr(self) -> str:
        experts, outputs, inputs = self.weight.shape
        return f"{experts} x ({inputs} -> {outputs}), {self.active} active"


class Embedding(nn.Module):
    """Token ids to vectors.  tokens_BS -> x_BSD in `dtype` (the model's compute dtype)"""

    def __init__(self, vocabulary: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, dim))

    def forward(self, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens_BS, self.weight).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
