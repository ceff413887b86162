"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) that clips on its way."""

from typing import Any

import torch
from torch import Tensor

from treadle.kernels.adamw import adamw_step
from treadle.parallel.shards import local

LARGE = 1 << 16  # elements of a tensor from which a kernel of its own pays


class AdamW(torch.optim.AdamW):
    """PyTorch's, fused. On a GPU each large tensor is stepped by a kernel that moves it once, clipping included.

    factor: what gradients are multiplied by in the next step, a scalar on the device; None: nothing.
    """

    factor: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.factor = None
        return loss

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """PyTorch's collects what it will step in these lists: parameters, gradients, both moments, maxima, counts.

        Large tensors are stepped here and taken off, the gradients of others are clipped.
        """
        complex_found: bool = super()._init_group(group, *lists)
        parameters, gradients, firsts, seconds, _, steps = lists
        tensors = [tuple(map(local, each)) for each in zip(parameters, gradients, firsts, seconds, strict=True)]
        large = [index for index, each in enumerate(tensors) if _suits_kernel(*each)]
        if large:
            torch._foreach_add_([steps[index] for index in large], 1)
            numbers = torch.stack([steps[index] for index in large]).tolist()
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for index, number in zip(large, numbers, strict=True):
                adamw_step(*tensors[index], step=int(number), scale=self.factor, **options)
            for each in (parameters, gradients, firsts, seconds, steps):
                each[:] = [entry for index, entry in enumerate(each) if index not in large]
        if self.factor is not None and gradients:
            torch._foreach_mul_(gradients, self.factor.to(gradients[0].device))
        return complex_found


def _suits_kernel(parameter: Tensor, *others: Tensor) -> bool:
    fits = parameter.is_cuda and parameter.dtype == torch.float32 and parameter.numel() >= LARGE
    return fits and all(each.is_contiguous() for each in (parameter, *others))
