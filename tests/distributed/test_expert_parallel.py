"""Experts on different processes: loss, every gradient and the next step are those of one process, in fp32."""

import functools
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from distributed_zoo import layer, loader, spec, training, whole
from harness import meshed, run
from torch.distributed.fsdp import FSDPModule

import treadle.train.setup
from treadle.errors import ConfigError
from treadle.parallel.compile import compile_layers
from treadle.parallel.config import ParallelConfig, check_layout
from treadle.parallel.expert import Flight, by_expert
from treadle.parallel.gradients import gradient_norm
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


MIXTURES = {
    "none": spec(),
    "softmax": mixture(2),
    "sigmoid": mixture(router=SIGMOID, balance_bias=0.01),
    "groups": mixture(router=GROUPS, balance_bias=0.01, **SHARED),
    "capacity": mixture(capacity=0.75, **SHARED),
    "biased": mixture(bias=True, router={"kind": "softmax", "bias": True}),
    "six": mixture(experts=6, bias=True, **SHARED),
    "loop": mixture(compute="loop"),
    "further": spec([layer(feedforward=BASE, repeat=1)], multi_token={"kind": "sequential", "depth": 1}),
}


@dataclass(frozen=True)
class Case:
    """rows: of a micro-batch. favourites: experts that every token chooses. backend: compile, with this."""

    model: str
    rows: int = 2
    optimizer: str = "adamw"
    favourites: tuple[int, ...] = ()
    backend: str | None = None
    precision: str = "fp32"
    training: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)


# A large eps: the first step of Adam is otherwise the sign of each gradient, of rounding errors too.
OPTIMIZERS = {"adamw": AdamWConfig(lr=3e-3, eps=1e-4), "muon": MuonConfig(lr=3e-3, eps=1e-4)}


def train(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Two steps; what the first one saw, and the weights after both."""
    config = training(compile=case.backend is not None, precision=case.precision, **case.training)
    if case.backend is not None:
        treadle.train.setup.compile_layers = partial(compile_layers, backend=case.backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    built = build_model(MIXTURES[case.model], config, seed=0, mesh=mesh, parallel=ParallelConfig(**case.parallel))
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
        optimizers.clip(0.5, norm)
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
    "bf16-selective": Case("groups", precision="bf16", training={"activation_checkpointing": "selective"}),
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
def alone(model: str, rows: int, optimizer: str, favourites: tuple[int, ...], precision: str) -> dict[str, Any]:
    return train(Case(model, rows, optimizer, favourites, precision=precision), Mesh())


@functools.cache
def together(world: str) -> dict[str, list[dict[str, Any]]]:
    ranks, sizes, cases = WORLDS[world]
    found = run(train_on_ranks, ranks, list(cases.values()), sizes)
    return {name: [rank[number] for rank in found] for number, name in enumerate(cases)}


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in WORLDS[world][2]])
def test_two_steps_are_those_of_one_process(world, name):
    case = WORLDS[world][2][name]
    expected = alone(case.model, case.rows, case.optimizer, case.favourites, case.precision)
    # Muon works in bf16: a last bit of a gradient may become a last bit of bf16 in the direction.
    moved = 1e-6 if case.optimizer == "adamw" and case.precision == "fp32" else 1e-3
    tolerance = 1e-6 if case.precision == "fp32" else 3e-3
    for found in together(world)[name]:
        assert_same(found, expected, tolerance=tolerance, moved=moved)
        assert (found["graphs"] > 0) == (case.backend is not None)
    if case.favourites:
        for counts_E in expected["loads"].values():
            assert counts_E.nonzero().flatten().tolist() == list(case.favourites)
    if "capacity" in case.model:
        assert expected["metrics"]["dropped"] > 0.1


def saved(folder: Any, step: int, case: Case, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Load the checkpoint of `step` (0: begin), train one step, save. What was loaded, and what came of it."""
    config = training()
    built = build_model(MIXTURES[case.model], config, seed=step, mesh=mesh)
    state = build_state(built, OPTIMIZERS[case.optimizer], config)
    checkpointer = Checkpointer(folder, CheckpointConfig(), mesh)
    if step:
        checkpointer.load(state, step)
    found = {f"before {name}": values for name, values in everything(state).items()}
    result = forward_backward(built, loader(mesh).micro_batches(step, 2), cross_entropy, mesh=mesh)
    state.optimizers.step()
    state.optimizers.zero_grad()
    balance(built, result.loads)
    state.step = step + 1
    checkpointer.save(state, {}, wait=True)
    return found | {f"after {name}": values for name, values in everything(state).items()}


def everything(state: Any) -> dict[str, torch.Tensor]:
    tensors = state.tensors()
    return {f"{part}.{name}": whole(t) for part in tensors for name, t in tensors[part].items()}


def saved_on_ranks(folder: Any, step: int, case: Case, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    with meshed(**sizes) as mesh:
        return saved(folder, step, case, mesh)


@pytest.mark.parametrize(
    ("case", "ranks", "sizes"), [(Case("groups"), 2, {"expert": 2}), (Case("six", optimizer="muon"), 4, {"expert": 2})]
)
def test_a_checkpoint_goes_on_without_and_with_it_again(tmp_path, case, ranks, sizes):
    first = run(saved_on_ranks, ranks, tmp_path, 0, case, sizes)[0]
    second = saved(tmp_path, 1, case, Mesh())
    third = run(saved_on_ranks, ranks, tmp_path, 2, case, sizes)[0]
    for earlier, later in ((first, second), (second, third)):
        for name in (name.removeprefix("after ") for name in earlier if name.startswith("after ")):
            assert torch.equal(earlier[f"after {name}"], later[f"before {name}"]), name


def journey(mode: str) -> tuple[list[str], list[tuple[int, ...]], float]:
    """The order of what happens in a mixture's forward and backward, sizes of what lies here, and an evaluation."""
    with meshed(expert=2) as mesh:
        built = build_model(MIXTURES["groups"], training(activation_checkpointing=mode), seed=0, mesh=mesh)
        moe = next(iter(mixtures(built).values()))
        events: list[str] = []
        start, land = Flight.start, Flight.land
        Flight.start = lambda *a: (events.append("start"), start(*a))[1]
        Flight.land = lambda *a: (events.append("land"), land(*a))[1]
        moe.shared.register_forward_hook(lambda *a: events.append("shared"))
        moe.shared.register_full_backward_hook(lambda *a: events.append("shared backward"))
        moe.gate_up.register_forward_hook(lambda *a: events.append("experts"))
        with torch.no_grad():
            evaluation = cross_entropy(built, loader(mesh).batch(0)).total
        loss = mesh.sum(evaluation.clone()).item()
        events.clear()
        forward_backward(built, loader(mesh).micro_batches(0, 4), cross_entropy, mesh=mesh)
        shards = [tuple(p.to_local().shape) for p in (moe.gate_up.weight, moe.down.weight)]
        return events, shards, loss


def test_the_shared_expert_is_computed_while_rows_travel():
    alone = build_model(MIXTURES["groups"], training(), seed=0)
    with torch.no_grad():
        expected = cross_entropy(alone, loader(Mesh()).batch(0)).total.item()
    forward = ["start", "shared", "land", "experts", "start", "land"]
    backward = ["start", "land", "start", "shared backward", "land"]
    for mode, order in (("none", forward + backward), ("full", forward + forward + backward)):
        for events, shards, loss in run(journey, 2, mode):
            assert events == order
            assert shards == [(4, 32, 32), (4, 32, 16)], "half of the experts"
            assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("arrived", [[[2, 0, 1], [0, 3, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 4], [1, 0]], [[3]]])
def test_rows_are_put_together_by_expert(arrived):
    arrived_PL = torch.tensor(arrived)
    rows = [
        (expert, process) for process, each in enumerate(arrived) for expert, n in enumerate(each) for _ in range(n)
    ]
    order, inverse = by_expert(arrived_PL, len(rows))
    assert [rows[i] for i in order.tolist()] == sorted(rows)
    assert order[inverse].tolist() == list(range(len(rows)))
    assert order.tolist() == sorted(range(len(rows)), key=lambda i: rows[i]), "earlier rows stay before later ones"


@pytest.mark.parametrize(
    ("world", "model", "sizes", "message"),
    [
        (8, "six", {"expert": 4}, r"parallel\.expert: 4 does not divide experts=6; try 1, 2"),
        (4, "softmax", {"expert": 3}, r"parallel\.expert: 3 does not divide shard x context = 4; try 1, 2, 4"),
        (4, "softmax", {"expert": 4, "replicate": 2}, r"4 does not divide shard x context = 2; try 1, 2$"),
        (2, "none", {"expert": 2}, r"parallel\.expert: 2, but no layer of the model has experts; set it to 1"),
        (6, "six", {"expert": 2}, None),
        (18, "six", {"expert": 2}, r"with 2, 9 processes share 3 experts of 32 and 32 rows, not equally; try 1$"),
    ],
)
def test_sizes_that_fit_or_not(world, model, sizes, message):
    config = ParallelConfig(**sizes)
    if message is None:
        assert check_layout(config, world, MIXTURES[model], world).expert == sizes["expert"]
        return
    with pytest.raises(ConfigError, match=message):
        check_layout(config, world, MIXTURES[model], world)


def groups_of_one() -> list[tuple[bool, bool]]:
    with meshed(expert=2) as mesh:
        built = build_model(MIXTURES["softmax"], training(), seed=0, mesh=mesh)
        experts = [moe.gate_up for moe in mixtures(built).values()]
        found = []
        for module in experts:
            assert isinstance(module, FSDPModule)
            found.append((module.weight.device_mesh.size(0) == 1, module.weight.device_mesh.size(1) == 2))
        return found


def test_experts_are_sharded_over_groups_of_one_where_there_is_one_group():
    """What the world of two above stands on: there PyTorch divides gradients by another number than it was told, unless
    sums are forced and the factor is one (a factor with forced sums is left out of groups of one)."""
    assert run(groups_of_one, 2) == [[(True, True)] * 2] * 2


def neighbours() -> tuple[list[int], list[int]]:
    with meshed(replicate=2, context=2, expert=2) as mesh:
        assert mesh.expert is not None
        assert mesh.expert_fsdp is not None
        return mesh.expert.mesh.tolist(), mesh.expert_fsdp.mesh.flatten().tolist()


def test_experts_are_dealt_to_neighbours_and_copied_with_the_model():
    """Eight processes: two copies, each on shard=2 x context=2."""
    found = run(neighbours, 8)
    assert [experts for experts, _ in found] == [[rank // 2 * 2, rank // 2 * 2 + 1] for rank in range(8)]
    assert [fsdp for _, fsdp in found] == [[0, 2, 4, 6], [1, 3, 5, 7]] * 4
