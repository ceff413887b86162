"""Bottlenecks between blocks: h + s up(relu(down(h))), after mixer and feed-forward (Houlsby et al. 2019,
arXiv:1902.00751), after the feed-forward alone (Pfeiffer et al. 2020, arXiv:2005.00247), or beside it, on its input
(He et al. 2021, arXiv:2110.04366).

They stand outside of the blocks, before what these return joins the residual stream, and so see what leaves a block
under any parallelism: under tensor parallelism some of the tokens.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from treadle.finetune.config import FinetuneConfig
from treadle.finetune.lora import Factor


class Bottleneck(nn.Module):
    """What is added to a block's output; `up` starts as zero.  h_BSD -> h_BSD"""

    roles = {"down": "replicate", "up": "replicate"}

    def __init__(self, dim: int, width: int, config: FinetuneConfig):
        super().__init__()
        self.scale, self.dropout, self.parallel = config.scale, config.dropout, config.placement == "parallel"
        self.down, self.up = Factor(dim, width, 1 / math.sqrt(dim)), Factor(width, dim, 0.0)

    def forward(self, h_BSD: Tensor) -> Tensor:
        h_BSD = F.dropout(h_BSD, self.dropout, self.training)
        return self.scale * self.up(F.relu(self.down(h_BSD)))  # type: ignore[no-any-return]


class Around:
    """Adds a bottleneck to what a block returns; a hook of the block, since blocks know nothing of it."""

    def __init__(self, bottleneck: Bottleneck):
        self.bottleneck, self.applied = bottleneck, True

    def __call__(self, block: nn.Module, arguments: tuple[Any, ...], y_BSD: Tensor) -> Tensor:
        if not self.applied:
            return y_BSD
        return y_BSD + self.bottleneck(arguments[0] if self.bottleneck.parallel else y_BSD)  # type: ignore[no-any-return]
