"""Muon on sharded matrices: bit by bit what one process does with the same gradients."""

import pytest
import torch
from distributed_zoo import MODELS, training, whole
from harness import meshed, run

from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import copy_whole, parts_of
from treadle.train.optimizers import MuonConfig
from treadle.train.setup import build_model


def steps(model: str, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Weights and momentum after three steps along gradients that depend on the parameter's name alone."""
    built = build_model(MODELS[model], training(), seed=0, mesh=mesh)
    optimizers, parts = MuonConfig(lr=0.02, weight_decay=0.1).build(built), parts_of(built)
    for step in range(3):
        for name, parameter in built.named_parameters():
            generator = torch.Generator().manual_seed(len(name) + 1000 * step)
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                gradient = torch.randn(parameter.shape, generator=generator)
                copy_whole(parameter.grad, gradient, parts.get(name, ()))
        optimizers.step()
    muon = optimizers.optimizers[0]
    names = {id(p): name for name, p in built.named_parameters()}
    momentum = {
        f"{names[id(p)]} momentum": whole(state["momentum"], parts.get(names[id(p)], ()))
        for p, state in muon.state.items()
    }
    return {**{name: whole(p, parts.get(name, ())) for name, p in built.named_parameters()}, **momentum}


def steps_on_ranks(model: str, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    with meshed(**sizes) as mesh:
        return steps(model, mesh)


@pytest.mark.parametrize(
    ("model", "ranks", "sizes"),
    [
        ("plain", 2, {}),
        ("odd", 3, {}),
        ("latent", 2, {}),
        ("further", 2, {}),
        ("moe", 4, {"replicate": 2}),
        ("moe", 2, {"replicate": 2}),
        ("latent", 4, {"replicate": 2}),
        ("plain", 4, {"replicate": 2}),
        ("plain", 2, {"tensor": 2}),
        ("moe", 4, {"shard": 2, "tensor": 2}),
        ("plain", 4, {"replicate": 2, "tensor": 2}),
    ],
)
def test_bitwise(model, ranks, sizes):
    expected = steps(model, Mesh())
    for found in run(steps_on_ranks, ranks, model, sizes):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            if name.endswith(("momentum",)) or "layers" in name:
                assert torch.equal(found[name], values), name
