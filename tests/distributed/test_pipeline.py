"""Pipelines: loss and every gradient against one process, in fp32, whatever the schedule and whatever it meets."""

import inspect
import itertools
import random
from functools import partial
from typing import Any

import pytest
import torch
from distributed_zoo import (
    MODELS,
    Case,
    alone,
    assert_same_step,
    loader,
    step_on_ranks,
    steps,
    together,
    training,
    whole,
)
from harness import RankFailed, meshed, run
from torch.distributed.pipelining import PipelineStage

from treadle.evaluate.perplexity import evaluate_perplexity
from treadle.inference.generate import stream
from treadle.parallel import weight_gradients
from treadle.parallel.config import ParallelConfig
from treadle.parallel.gradients import gradient_norm
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import _Stage, balance, own_parameters, pipeline_of
from treadle.parallel.shards import parts_of
from treadle.parallel.weight_gradients import DeferringGroupedLinear, DeferringLinear
from treadle.train import setup
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig
from treadle.train.forward_backward import forward_backward
from treadle.train.loop import Callback, Loop
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig
from treadle.train.schedules import ConstantConfig
from treadle.train.setup import build_model, build_state


def changed(changes: dict[str, Any], *arguments: Any) -> Any:
    return step_on_ranks(*arguments, **changes)


GRAPHS: list[int] = []  # operations of each graph that was compiled here


def compiled(changes: dict[str, Any], *arguments: Any) -> Any:
    """The same with `compile`, by a backend that only counts, on top of what makes backward graphs."""
    from torch._dynamo.backends.debugging import aot_eager

    def counting(graph: Any, inputs: Any, **options: Any) -> Any:
        GRAPHS.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return aot_eager(graph, inputs, **options)

    setup.compile_layers = partial(setup.compile_layers, backend=counting)
    setup.compile_between = partial(setup.compile_between, backend=counting)
    return {**changed({**changes, "compile": True}, *arguments), "graphs": GRAPHS}


def staged(
    model: str, schedule: str, ranks: int = 2, rows: int = 2, options: Any = None, training: Any = None, **sizes: int
):
    options = {"schedule": schedule, **(options or {})}
    return Case(model, ranks, {"pipeline": 2, **sizes}, rows, options, training or {})


SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
FREED, FULL = {"reshard": "after_forward"}, {"activation_checkpointing": "full"}
CASES = {
    **{schedule: staged("deep", schedule) for schedule in SCHEDULES},
    "four": staged("deeper", "1f1b", 4, pipeline=4),
    "four-v": staged("deeper", "zbv", 4, pipeline=4),
    "fsdp": staged("deep", "1f1b", 4, 1),
    "fsdp-freed": staged("deep", "1f1b", 4, 1, options=FREED),
    "fsdp-v": staged("deep", "zbv", 4, 1),
    "fsdp-v-freed": staged("deep", "zbv", 4, 1, options=FREED),
    "ddp": staged("deep", "interleaved_zero_bubble", 4, 1, replicate=2),
    "tied": staged("deep-tied", "1f1b"),
    "tied-v": staged("deep-tied", "zbv"),
    "tied-fsdp": staged("deep-tied", "interleaved_1f1b", 4, 1),
    "tied-fsdp-v": staged("deep-tied", "dualpipev", 4, 1),
    "further": staged("deep-further", "1f1b"),
    "further-v": staged("deep-further", "zbv"),
    "further-fsdp": staged("deep-further", "1f1b", 4, 1),
    "moe": staged("deep-moe", "1f1b"),
    "moe-v": staged("deep-moe", "zbv"),
    "moe-fsdp-v": staged("deep-moe", "zbv", 4, 1),
    "latent": staged("deep-latent", "1f1b"),
    "latent-v": staged("deep-latent", "zbv"),
    "recompute": staged("deep", "1f1b", training=FULL),
    "recompute-v": staged("deep", "zbv", training=FULL),
    "selective-v": staged("deep", "zbv", training={"activation_checkpointing": "selective"}),
    "recompute-fsdp-v-freed": staged("deep", "zbv", 4, 1, options=FREED, training=FULL),
    "tensor": staged("deep-tied", "1f1b", 4, tensor=2),
    "tensor-further": staged("deep-further", "interleaved_1f1b", 4, tensor=2),
    "expert": staged("deep-moe", "1f1b", 4, 1, expert=2),
    "dealt": staged("deep", "1f1b", options={"stage_layers": [4, 1]}),
}
found_in = steps(CASES)


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_that_of_one_process(name):
    assert_same_step(together(found_in(name)), alone(CASES[name].model, CASES[name].rows))


@pytest.mark.parametrize(
    ("model", "schedule", "recompute", "graphs", "ranks", "sizes"),
    [
        ("deep", "1f1b", "none", 1, 2, {}),
        ("deep", "zbv", "full", 5, 2, {}),
        ("deep-moe", "zbv", "none", None, 2, {}),
        ("deep-tied", "zbv", "full", 5, 4, {"shard": 2}),
        ("deep-heads", "zbv", "none", None, 4, {"tensor": 2}),
    ],
)
def test_compiled(model, schedule, recompute, graphs, ranks, sizes):
    changes, sizes, rows = (
        {"activation_checkpointing": recompute},
        {"pipeline": 2, **sizes},
        1 if "shard" in sizes else 2,
    )
    found = run(compiled, ranks, changes, model, rows, {**sizes, "schedule": schedule}, sizes, seconds=120)
    assert_same_step(together(found), alone(model, rows))
    for step in found:
        # All layers share what is compiled: the whole of one, or the pieces between matmuls, attention the largest.
        assert graphs in (None, len(step["graphs"]))
        assert max(step["graphs"]) > 20


def counted(model: str, schedule: str, sizes: dict[str, int], rows: int) -> tuple[dict[str, int], int, int, int]:
    """How often each layer ran, and its inside; how many gradients of weights were formed, and what should be."""
    with meshed(**sizes) as mesh:
        config = training(activation_checkpointing="full")
        forwards: dict[str, int] = {}
        products = [0]
        for kind in (DeferringLinear, DeferringGroupedLinear):

            def counting(self, *arguments, plain=kind.product):
                forwards[names[self]] = forwards.get(names[self], 0) + 1
                return plain(self, *arguments)

            kind.product = counting
        for name in ("add_outer_products", "grouped_weight_gradient"):

            def adding(*arguments, plain=getattr(weight_gradients, name), **options):
                products[0] += 1
                return plain(*arguments, **options)

            setattr(weight_gradients, name, adding)
        built = build_model(
            MODELS[model], config, seed=0, mesh=mesh, parallel=ParallelConfig(**sizes, schedule=schedule)
        )
        kinds = (DeferringLinear, DeferringGroupedLinear)
        names = {module: name for name, module in built.named_modules() if isinstance(module, kinds)}
        batches = loader(mesh).micro_batches(0, rows)
        forward_backward(built, batches, cross_entropy, mesh=mesh)
        return forwards, products[0], len(names), len(batches)


@pytest.mark.parametrize(
    ("ranks", "model", "schedule", "sizes"),
    [
        (2, "deep", "interleaved_zero_bubble", {}),
        (2, "deep", "zbv", {}),
        (2, "deep", "dualpipev", {}),
        (4, "deep-moe", "zbv", {"tensor": 2}),
        (4, "deep-moe", "zbv", {"expert": 2}),
    ],
)
def test_nothing_runs_twice(ranks, model, schedule, sizes):
    """No forward but the micro-batches' and their recomputation, at the first step too; each weight gradient once."""
    rows = 1 if "expert" in sizes else 2
    for forwards, products, linears, micro_batches in run(
        counted, ranks, model, schedule, {"pipeline": 2, **sizes}, rows
    ):
        assert len(forwards) == linears
        assert set(forwards.values()) == {2 * micro_batches}
        assert products == linears * micro_batches


def narrow(mesh: Mesh, schedule: str) -> tuple[float, dict[str, torch.Tensor]]:
    config, parallel = training(precision="bf16"), ParallelConfig(pipeline=mesh.layout.pipeline, schedule=schedule)
    built = build_model(MODELS["deep-further"], config, seed=0, mesh=mesh, parallel=parallel)
    result = forward_backward(built, loader(mesh).micro_batches(0, 1), cross_entropy, mesh=mesh)
    return result.loss.item(), {n: whole(p.grad) for n, p in built.named_parameters() if p.grad is not None}


def narrow_on_ranks(schedule: str) -> tuple[float, dict[str, torch.Tensor]]:
    with meshed(pipeline=2) as mesh:
        return narrow(mesh, schedule)


@pytest.mark.parametrize(("ranks", "schedule"), [(2, "zbv"), (4, "zbv"), (4, "1f1b")])
def test_bf16(ranks, schedule):
    """Gathered weights are bf16, their gradients float32, added up over micro-batches without rounding in between."""
    expected, right = narrow(Mesh(), "1f1b")
    for loss, grads in run(narrow_on_ranks, ranks, schedule):
        assert loss == pytest.approx(expected, abs=1e-3)
        for name, grad in grads.items():
            assert grad.dtype == torch.float32
            assert (grad - right[name]).norm() < 0.02 * right[name].norm(), name


OPTIMIZERS = {"adamw": AdamWConfig(lr=3e-3), "muon": MuonConfig(lr=3e-3)}


class Records(Callback):
    def __init__(self) -> None:
        self.records: list[Any] = []

    def step(self, loop, record):
        self.records.append((record.loss, record.grad_norm, record.metrics))


def trained(mesh: Mesh, model: str, optimizer: str, parallel: dict[str, Any], folder: Any, load: bool = False) -> Any:
    """Two clipped steps and a checkpoint, or what it holds; then a third step. What each step said, and the states."""
    config = training(clip_norm=0.1, steps=3)
    built = build_model(MODELS[model], config, seed=9 if load else 0, mesh=mesh, parallel=ParallelConfig(**parallel))
    state = build_state(built, OPTIMIZERS[optimizer], config)
    checkpointer = Checkpointer(folder, CheckpointConfig(), mesh)
    said = Records()

    def go(steps: int) -> None:
        changed = training(clip_norm=0.1, steps=steps)
        batches = loader(mesh).iterate_micro(2, state.step, steps)
        Loop(state, changed, ConstantConfig(), cross_entropy, [said], mesh=mesh).run(batches)

    if load:
        checkpointer.load(state, 2)
    else:
        go(2)
        checkpointer.save(state, {}, wait=True)
    tensors = state.tensors()
    parts = parts_of(built)
    held = {f"model.{name}": whole(p, parts.get(name, ())) for name, p in built.named_parameters()}
    # Not those of stacks cut by tensor parallelism, which are no tensors; a wrong one shows in the next step.
    held |= {f"optimizer.{key}": whole(t) for key, t in tensors["optimizer"].items() if isinstance(t, torch.Tensor)}
    go(3)
    return said.records, held, {name: whole(p, parts.get(name, ())) for name, p in built.named_parameters()}


def trained_on_ranks(sizes: dict[str, int], *arguments: Any) -> Any:
    with meshed(**sizes) as mesh:
        return trained(mesh, *arguments)


@pytest.mark.parametrize(
    ("model", "optimizer", "ranks", "schedule", "sizes"),
    [
        ("deep-tied", "adamw", 2, "1f1b", {}),
        ("deep-tied", "adamw", 4, "zbv", {}),
        ("deep-moe", "muon", 2, "zbv", {}),
        ("deep-further", "muon", 4, "interleaved_1f1b", {}),
        ("deep-tied", "adamw", 4, "1f1b", {"tensor": 2}),
        ("deep-moe", "muon", 4, "1f1b", {"expert": 2}),
        ("deep-moe", "muon", 4, "1f1b", {"pipeline": 1, "expert": 2, "tensor": 2}),
    ],
)
def test_training_clips_and_goes_on_in_one_process(tmp_path, model, optimizer, ranks, schedule, sizes):
    """Losses, norms, loads and weights of one process; a pipeline's checkpoint is one process's, and the reverse."""
    sizes = {"pipeline": 2, **sizes}
    parallel = {**sizes, "schedule": schedule}
    found = run(trained_on_ranks, ranks, sizes, model, optimizer, parallel, tmp_path / "staged")
    alone_said, alone_held, alone_weights = trained(Mesh(), model, optimizer, {}, tmp_path / "alone")
    resumed = trained(Mesh(), model, optimizer, {}, tmp_path / "staged", True)
    staged = run(trained_on_ranks, ranks, sizes, model, optimizer, parallel, tmp_path / "alone", True)
    tolerance = 2e-6 if optimizer == "adamw" else 5e-4  # Muon works in bf16
    if "tensor" not in sizes:
        assert set().union(*(held for _, held, _ in found)) == set(alone_held)
    for said, held, weights in found:
        for mine, right in zip(said, alone_said, strict=True):
            assert mine[:2] == pytest.approx(right[:2], abs=tolerance)
            assert mine[2] == pytest.approx(right[2], abs=10 * tolerance)
        for name, values in held.items():  # bit by bit what was saved, and the same in both copies of an embedding
            assert torch.equal(resumed[1][name], values), name
        for name, values in weights.items():
            assert (alone_weights[name] - values).abs().max() < 3 * tolerance, name
    assert resumed[0][0][:2] == pytest.approx(found[0][0][2][:2], abs=tolerance)
    for said, held, _ in staged:
        assert said[0][:2] == pytest.approx(alone_said[2][:2], abs=tolerance)
        for name, values in held.items():
            assert torch.equal(alone_held[name], values), name


def generated(mesh: Mesh, model: str, parallel: dict[str, Any]) -> Any:
    """Likeliest tokens after a prompt, nats of held-out rows in batches of any size, and the loss of a step after that:
    what is sampled first, as by `treadle generate`, must leave nothing behind that cannot be trained with."""
    built = build_model(MODELS[model], training(), seed=0, mesh=mesh, parallel=ParallelConfig(**parallel))
    pipeline = pipeline_of(built)
    agree = partial(mesh.same, source=0 if pipeline is None else pipeline.end_rank)
    tokens = list(stream(built, [5, 6, 7], max_new_tokens=6, temperature=0.0, samples=2, agree=agree))
    rows = [loader(mesh).samples(first, first + size) for first, size in ((0, 3), (3, 1))]
    score = evaluate_perplexity(built, rows[mesh.data_rank :: mesh.data_size], 1000, mesh=mesh)
    result = forward_backward(built, loader(mesh).micro_batches(0, 2), cross_entropy, mesh=mesh)
    return tokens, score, result.loss.item(), gradient_norm(own_parameters(built), mesh).item()


def generated_on_ranks(sizes: dict[str, int], model: str, schedule: str) -> Any:
    with meshed(**sizes) as mesh:
        return generated(mesh, model, {**sizes, "schedule": schedule})


@pytest.mark.parametrize(
    ("ranks", "model", "schedule", "sizes"),
    [
        (2, "deep-latent", "1f1b", {}),
        (2, "deep-latent", "zbv", {}),
        (2, "deep-latent", "interleaved_1f1b", {}),
        (4, "deep-latent", "1f1b", {"tensor": 2}),
        (4, "deep-mla", "interleaved_1f1b", {"tensor": 2}),
        (4, "deep-mla", "zbv", {"context": 2}),
        (2, "deep-latent", "1f1b", {"pipeline": 1}),
    ],
)
def test_samples_and_evaluation(ranks, model, schedule, sizes):
    tokens, score, *trained = generated(Mesh(), model, {})
    for found, perplexity, *numbers in run(generated_on_ranks, ranks, {"pipeline": 2, **sizes}, model, schedule):
        assert found == tokens
        assert numbers == pytest.approx(trained, abs=2e-6)
        assert perplexity.loss == pytest.approx(score.loss, abs=1e-6)
        assert perplexity.tokens == score.tokens


def refused(rows: int, loss_function: Any) -> str:
    with meshed(pipeline=2) as mesh:
        built = build_model(MODELS["plain"], training(), seed=0, mesh=mesh, parallel=ParallelConfig(pipeline=2))
        try:
            forward_backward(built, loader(mesh).micro_batches(0, rows), loss_function, mesh=mesh)
        except ValueError as error:
            return str(error)
        return "nothing"


def twice(model, batch):
    model.hidden(batch.tokens_BS)
    model.hidden(batch.tokens_BS)


def test_what_a_pipeline_cannot_run():
    for said in run(refused, 2, 3, cross_entropy):
        assert "must have one shape, not [(2, 16), (3, 16)]" in said
    with pytest.raises(RankFailed, match=r"model\.hidden was called twice for one micro-batch"):
        run(refused, 2, 4, twice)


@pytest.mark.parametrize("seed", range(20))
def test_stages_are_balanced(seed):
    """Against all ways to cut: no other has a cheaper dearest stage."""
    generator = random.Random(seed)
    layers = [generator.choice([1.0, 2.0, 5.0]) for _ in range(generator.randint(4, 9))]
    end, stages = generator.choice([0.0, 3.0]), generator.randint(1, 4)

    def dearest(counts: list[int]) -> float:
        stops = [0, *itertools.accumulate(counts)]
        costs = [sum(layers[a:b]) for a, b in itertools.pairwise(stops)]
        return max([*costs[:-1], costs[-1] + end])

    found = balance(layers, end, stages)
    assert (len(found), sum(found), min(found) >= 1) == (stages, len(layers), True)
    ways = itertools.combinations(range(1, len(layers)), stages - 1)
    others = [[b - a for a, b in itertools.pairwise((0, *stops, len(layers)))] for stops in ways]
    assert dearest(found) == min(map(dearest, others))


def test_equal_layers_are_shared_out_equally():
    assert balance([1.0] * 8, 0.0, 4) == [2, 2, 2, 2]
    assert balance([1.0] * 7, 1.0, 4) == [2, 2, 2, 1]


def test_private_names_are_still_there():
    assert callable(PipelineStage._get_init_p2p_neighbors_ops)
    assert "operation.peer" in inspect.getsource(_Stage)
    assert [*inspect.signature(PipelineStage.__init__).parameters][1:7] == [
        *("submodule", "stage_index", "num_stages", "device", "input_args", "output_args")
    ]
