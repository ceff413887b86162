"""Experts on different processes: loss, every gradient and the next step are those of one process, in fp32."""

import functools
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_zoo import MODELS, layer, loader, spec, training, whole
from harness import meshed, run
from torch.distributed.fsdp import FSDPModule

import treadle.train.setup
from treadle.errors import ConfigError
from treadle.nn.moe import MoE
from treadle.parallel.compile import compile_layers
from treadle.parallel.config import ParallelConfig, check_layout
from treadle.parallel.expert import Exchange, Flight, _Land, _Start, by_expert
from treadle.parallel.gradients import clip_gradients, gradient_norm
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import copy_whole
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig
from treadle.train.routing import balance, mixtures
from treadle.train.setup import build_model, build_state

BASE = {"kind": "moe", "experts": 8, "top_k": 2, "dim": 16, "z_loss": 0.001}
SHARED = {"shared": {"kind": "gated", "dim": 24}, "shared_gate": True}
SIGMOID = {"kind": "sigmoid", "scale": 2.5}
GROUPS = {**SIGMOID, "groups": {"count": 4, "keep": 2}}


def mixture(repeat: int = 1, **changes: Any) -> Any:
    return spec([layer(feedforward={**BASE, **changes}, repeat=repeat), layer(repeat=1)])


MODELS.update(
    {
        "softmax": mixture(2),
        "sigmoid": mixture(router=SIGMOID, balance_bias=0.01),
        "groups": mixture(router=GROUPS, balance_bias=0.01, **SHARED),
        "capacity": mixture(capacity=0.75, **SHARED),
        "biased": mixture(bias=True, router={"kind": "softmax", "bias": True}),
        "six": mixture(experts=6, bias=True, **SHARED),
        "loop": mixture(compute="loop"),
        "further": spec([layer(feedforward=BASE, repeat=1)], multi_token={"kind": "sequential", "depth": 1}),
    }
)


@dataclass(frozen=True)
class Case:
    """rows: of a micro-batch. favourites: experts that every token chooses. backend: compile, with this."""

    model: str
    rows: int = 2
    optimizer: str = "adamw"
    favourites: tuple[int, ...] = ()
    backend: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)


# A large eps: the first step of Adam is otherwise the sign of each gradient, of rounding errors too.
OPTIMIZERS = {"adamw": AdamWConfig(lr=3e-3, eps=1e-4), "muon": MuonConfig(lr=3e-3, eps=1e-4)}


def train(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Two steps; what the first one saw, and the weights after both."""
    config = training(compile=case.backend is not None, **case.training)
    if case.backend is not None:
        treadle.train.setup.compile_layers = partial(compile_layers, backend=case.backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    built = build_model(MODELS[case.model], config, seed=0, mesh=mesh, parallel=ParallelConfig(**case.parallel))
    favour(built, case.favourites)
    found: dict[str, Any] = {"initial": {n: whole(p) for n, p in built.named_parameters()}, "losses": []}
    optimizers = OPTIMIZERS[case.optimizer].build(built)
    for step in range(2):
        batches = loader(mesh).micro_batches(step, case.rows)
        result = forward_backward(built, batches, partial(cross_entropy, z_loss=1e-3), mesh=mesh)
        norm = gradient_norm(built.parameters(), mesh)
        if step == 0:
            found["gradients"] = {n: whole(p.grad) for n, p in built.named_parameters() if p.grad is not None}
            found["loads"] = {name: load.counts_E for name, load in result.loads.items()}
            found["metrics"] = {name: value.item() for name, value in result.metrics.items()}
            found["norm"] = norm.item()
        found["losses"].append(result.loss.item())
        clip_gradients(built.parameters(), 0.5, norm)
        optimizers.step()
        optimizers.zero_grad()
        balance(built, result.loads)
    found["final"] = {n: whole(p) for n, p in built.named_parameters()}
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def favour(model: Any, experts: tuple[int, ...]) -> None:
    """Make every token choose these, by the balancing bias, which is no part of the weights."""
    for moe in mixtures(model).values():
        if experts:
            bias = torch.zeros(moe.experts)
            bias[list(experts)] = 100.0
            copy_whole(moe.router.balance_bias, bias)


def train_on_ranks(cases: list[Case], sizes: dict[str, int]) -> list[dict[str, Any]]:
    with meshed(**sizes) as mesh:
        return [train(case, mesh) for case in cases]


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, tolerance: float, moved: float) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=10 * tolerance)
    assert found["losses"][0] == pytest.approx(expected["losses"][0], abs=tolerance)
    assert found["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=10 * tolerance)
    for name, counts in expected["loads"].items():
        assert torch.equal(found["loads"][name], counts), name
    for name, values in expected["initial"].items():
        assert torch.equal(found["initial"][name], values), f"{name} starts otherwise"
    for part, limit in (("gradients", tolerance), ("final", moved)):
        assert found[part].keys() == expected[part].keys()
        for name, values in expected[part].items():
            error = (found[part][name] - values).abs().max().item()
            assert error < limit, f"{part} {name}: {error:.2e}"


# Everything that a mixture can be, on the smallest group. An expert's rows: by default 2 rows x 16 tokens x 2 of 8.
FEATURES = {
    "softmax": Case("softmax"),
    "sigmoid": Case("sigmoid", optimizer="muon"),
    "groups": Case("groups"),
    "capacity": Case("capacity"),
    "biased": Case("biased"),
    "loop": Case("loop"),
    "further": Case("further"),
    "one-expert-each": Case("groups", favourites=(0, 2)),
    "idle-process": Case("sigmoid", favourites=(1, 2)),
    "accumulate": Case("groups", rows=1),
    "recompute": Case("groups", training={"activation_checkpointing": "full"}),
    "selective": Case("groups", training={"activation_checkpointing": "selective"}),
    "compile": Case("groups", backend="aot_eager"),
    "compile-recompute": Case("groups", backend="aot_eager", training={"activation_checkpointing": "full"}),
    "compile-selective": Case("groups", backend="aot_eager", training={"activation_checkpointing": "selective"}),
    "never": Case("groups", parallel={"reshard": "never"}),
    "offload": Case("groups", parallel={"cpu_offload": True}),
}
# What depends on how experts are cut: whole ones, or rows of each; in groups with neighbours, or with copies beside.
CUTS = {
    "whole": Case("groups", optimizer="muon"),
    "whole-capacity": Case("capacity"),
    "idle-process": Case("sigmoid", favourites=(6, 7)),
    "rows": Case("six", optimizer="muon"),
    "accumulate": Case("six", rows=1),
}
WORLDS: dict[str, tuple[int, dict[str, int], dict[str, Case]]] = {
    "2": (2, {"expert": 2}, FEATURES),
    "2x2": (4, {"expert": 2}, CUTS),
    "4": (4, {"expert": 4}, {name: case for name, case in CUTS.items() if case.model != "six"}),
    "2+2": (4, {"expert": 2, "replicate": 2}, CUTS),
}


@functools.cache
def alone(model: str, rows: int, optimizer: str, favourites: tuple[int, ...]) -> dict[str, Any]:
    return train(Case(model, rows, optimizer, favourites), Mesh())


@functools.cache
def together(world: str) -> dict[str, list[dict[str, Any]]]:
    ranks, sizes, cases = WORLDS[world]
    found = run(train_on_ranks, ranks, list(cases.values()), sizes)
    return {name: [rank[number] for rank in found] for number, name in enumerate(cases)}


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in WORLDS[world][2]])
def test_two_steps_are_those_of_one_process(world, name):
    case = WORLDS[world][2][name]
    expected = alone(case.model, case.rows, case.optimizer, case.favourites)
    # Muon works in bf16: a last bit of a gradient may become a last bit of bf16 in the direction.
    moved = 1e-6 if case.optimizer == "adamw" else 3e-4
    for found in together(world)[name]:
        assert_same(found, expected, tolerance=1e-6, moved=moved)
        assert (found["graphs"] > 0) == (case.backend is not None)
    if case.favourites:
        for counts_E in expected["loads"].values():
            assert counts_E.nonzero().flatten().tolist() == list(case.favourites)
    if "capacity" in case.model:
        assert expected["metrics"]["dropped"] > 0.1
