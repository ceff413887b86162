"""A short causal convolution of each channel with itself: how recurrent mixers let a token see its neighbours.

B batch, S sequence, E channels, W width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_s = sum_j weight_j x_s-j over the last `width` tokens of the same document.  x_BSE -> y_BSE in the dtype of x

    parts: {name: size} of what is convolved side by side; None: one thing.
    """

    roles = {"weight": "column"}

    def __init__(self, channels: int, width: int, parts: Mapping[str, int] | None = None):
        super().__init__()
        self.parts, self.width = dict(parts or {}), width
        # Shaped as in nn.Conv1d, the last tap is the token's own: no matrix, to an optimizer that asks for matrices.
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def initial(self, name: str, uniform: Tensor) -> Tensor:
        """As nn.Conv1d starts: even between -1/sqrt(width) and 1/sqrt(width)."""
        return (2 * uniform - 1) / math.sqrt(self.width)

    def forward(self, x_BSE: Tensor, positions_BS: Tensor, past_BWE: Tensor | None = None) -> Tensor:
        """past_BWE: the width - 1 inputs before x; None is zeros. What lies before position 0 is never seen."""
        before = self.width - 1
        if past_BWE is None:
            past_BWE = x_BSE.new_zeros(x_BSE.shape[0], before, x_BSE.shape[2])
        window_BTE = torch.cat((past_BWE.to(x_BSE.dtype), x_BSE), dim=1)
        weight_WE = self.weight[:, 0].t().to(x_BSE.dtype)
        length = x_BSE.shape[1]
        y_BSE = weight_WE[before] * x_BSE
        for back in range(1, self.width):
            tap_BSE = weight_WE[before - back] * window_BTE[:, before - back : before - back + length]
            # The product is masked, not the input: so the backward keeps no masked copy of the input for each tap.
            y_BSE = y_BSE + tap_BSE.masked_fill((positions_BS < back)[:, :, None], 0)
        return y_BSE

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}"
