"""Optimizers, and which of them steps which parameter."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from treadle.config import Kind
from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.roles import feature_matrices, parameter_roles
from treadle.parallel.gradients import clip_factor, scale_gradients
from treadle.parallel.shards import mesh_of
from treadle.train.adamw import AdamW
from treadle.train.muon import Muon

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]


class OptimizerConfig(Kind):
    """Base: the peak learning rate; matrices decay, vectors (norms, biases) do not."""

    lr: PositiveFloat = Field(3e-4, description="peak learning rate")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled weight decay of matrices")

    def build(self, model: nn.Module) -> "Optimizers":
        raise TypeError(f"{type(self).__name__} does not define build")


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    betas: Betas = Field((0.9, 0.95), description="decay of the first and second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")

    def build(self, model: nn.Module) -> "Optimizers":
        return Optimizers([self.for_parameters(model, trainable(model))])

    def for_parameters(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        groups = list(_decay_groups(model, parameters, self.weight_decay, self.lr))
        return AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class MuonConfig(OptimizerConfig):
    """Muon for the matrices that map features to features, AdamW for tables, head, routers and vectors, at one rate.

    Muon's update is scaled to the size of AdamW's (Moonlight, arXiv:2502.16982), so the same rate and decay serve both.
    """

    kind: Literal["muon"] = "muon"
    momentum: PositiveFloat = Field(0.95, lt=1, description="decay of Muon's momentum")
    nesterov: bool = Field(True, description="Nesterov momentum")
    iterations: PositiveInt = Field(5, description="Newton-Schulz iterations")
    betas: Betas = Field((0.9, 0.95), description="AdamW's betas, for the rest")
    eps: PositiveFloat = Field(1e-8, description="AdamW's eps, for the rest")

    def build(self, model: nn.Module) -> "Optimizers":
        parameters, inside, modules = trainable(model), feature_matrices(model), dict(model.named_modules())
        matrices = {name: parameter for name, parameter in parameters.items() if name in inside}
        rest = {name: parameter for name, parameter in parameters.items() if name not in inside}
        groups = []
        for name, parameter in matrices.items():
            owner = modules[name.rpartition(".")[0]]
            parts = tuple(owner.parts.values()) if isinstance(owner, Linear | GroupedLinear) else ()
            groups.append({"params": [parameter], "parts": parts})
        options: Any = {"device": getattr(model, "device", None)}  # of offloaded weights, the GPU
        muon = Muon(groups, self.lr, self.weight_decay, self.momentum, self.nesterov, self.iterations, **options)
        adamw = AdamWConfig(lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, eps=self.eps)
        return Optimizers([muon, adamw.for_parameters(model, rest)])


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    weight_decay: NonNegativeFloat = Field(0.1, description="weight decay of matrices, added to their gradient")
    momentum: NonNegativeFloat = Field(0.9, lt=1, description="decay of the momentum; 0: none")
    nesterov: bool = Field(False, description="Nesterov momentum")

    def build(self, model: nn.Module) -> "Optimizers":
        groups = list(_decay_groups(model, trainable(model), self.weight_decay, self.lr))
        return Optimizers([torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient; a balancing bias, say, is moved by other means."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _decay_groups(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], weight_decay: float, lr: float
) -> Iterator[dict[str, object]]:
    """Matrices and filters with decay, norms, biases and other vectors without, on each mesh of processes; and those of
    modules that say `lr_ratio` at a rate of their own."""
    roles, modules = parameter_roles(model), dict(model.named_modules())
    groups: dict[Any, list[nn.Parameter]] = {}
    for name, p in parameters.items():
        decays = p.ndim >= 2 and roles[name] != "norm" and not name.endswith("bias")
        ratio = getattr(modules[name.rpartition(".")[0]], "lr_ratio", 1.0)
        groups.setdefault((not decays, ratio, mesh_of(p)), []).append(p)
    for (plain, ratio, _), chosen in sorted(groups.items(), key=lambda item: item[0][:2]):
        yield {"params": chosen, "weight_decay": 0.0 if plain else weight_decay, "lr": lr * ratio}


class Optimizers:
    """Several optimizers stepped as one; together they hold every parameter once."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def set_lr(self, factor: float) -> float:
        """Set each group's rate to `factor` times its peak; returns the first group's rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        return float(self.optimizers[0].param_groups[0]["lr"])

    def clip(self, limit: float, norm: Tensor) -> None:
        """Let the next step see gradients of norm `limit` if their `norm` is more."""
        factor = clip_factor(limit, norm)
        for optimizer in self.optimizers:
            if isinstance(optimizer, AdamW):
                optimizer.factor = factor
            else:
                scale_gradients([p for group in optimizer.param_groups for p in group["params"]], factor)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
