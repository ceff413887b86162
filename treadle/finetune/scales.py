"""Learned factors on outputs, or on the inputs of a row matrix (IA3; Liu et al. 2022, arXiv:2205.05638)."""

import torch
from torch import Tensor, nn

from treadle.finetune.adapted import wide
from treadle.finetune.config import FinetuneConfig
from treadle.nn.roles import Role


class Scale(nn.Module):
    """A factor for each feature, at first one. inputs: it is on what the matrix reads, else on what comes out."""

    def __init__(self, inputs: int, outputs: int, rank: int, role: Role, part: str, config: FinetuneConfig):
        super().__init__()
        self.inputs = role == "row"
        size = inputs if self.inputs else outputs
        self.parts = {part: size}
        self.roles = {"factor": "replicate" if role == "replicate" else "column"}  # it is cut as the features are
        self.factor = nn.Parameter(torch.empty(size))

    def initial(self, name: str, uniform: Tensor) -> Tensor:
        return torch.ones_like(uniform)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)

    def merged(self, weight_OI: Tensor) -> Tensor:
        factor = wide(self.factor)
        return weight_OI * (factor if self.inputs else factor[:, None])

    def merged_bias(self, bias_O: Tensor) -> Tensor:
        return bias_O if self.inputs else bias_O * wide(self.factor)
