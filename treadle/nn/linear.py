"""The linear layer and the embedding: fp32 master weights, computed in the dtype of what flows through them.

V vocabulary, D model dim.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def extra_repr(self) -> str:
        parts = f", parts={self.parts}" if self.parts else ""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}{parts}"


class Embedding(nn.Module):
    """Token ids to vectors.  tokens_BS -> x_BSD in `dtype` (the model's compute dtype)"""

    def __init__(self, vocabulary: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, dim))

    def forward(self, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens_BS, self.weight).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
