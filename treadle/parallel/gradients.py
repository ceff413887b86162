"""The norm of gradients that are spread over processes, and clipping to it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import gather, mesh_of


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The norm of all gradients, the same on every process.  -> scalar on the compute device

    parameters: of a pipeline, those that this process answers for (`treadle.parallel.pipeline.own_parameters`).
    """
    groups = _by_mesh(parameters)
    norms = [gather(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    total = (torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]).to(mesh.device)
    return total if mesh.pipeline is None else mesh.sum_stages(total.square()).sqrt()


def clip_factor(limit: float, norm: Tensor) -> Tensor:
    """What gradients of this norm are multiplied by to have norm `limit`; one if they have less."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply gradients by a scalar, in place."""
    for group in _by_mesh(parameters):
        gradients = [p.grad for p in group if p.grad is not None]
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those with a gradient, by the mesh that they are on: PyTorch's functions refuse a mixture."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(mesh_of(parameter), []).append(parameter)
    return list(groups.values())
