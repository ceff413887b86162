"""Pipelines: loss and every gradient against one process, in fp32, whatever the schedule and whatever it meets."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from distributed_zoo import assert_same_step, step_of, step_on_ranks
from harness import run

from treadle.parallel.mesh import Mesh
from treadle.train import setup


@cache
def alone(model: str, rows: int) -> dict[str, Any]:
    return step_of(model, Mesh(), rows)


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stages hold, as one. What several of them hold must be the same."""
    whole = {**found[0], "gradients": {}, "initial": {}}
    for step in found:
        for part in ("gradients", "initial"):
            for name, values in step[part].items():
                assert torch.equal(whole[part].setdefault(name, values), values), name
        for key in ("loss", "norm", "tokens", "metrics"):
            assert step[key] == found[0][key], key
        assert step["loads"].keys() == found[0]["loads"].keys()
    return whole


def changed(changes: dict[str, Any], *arguments: Any) -> Any:
    return step_on_ranks(*arguments, **changes)


def check(ranks: int, model: str, schedule: str, rows: int = 2, sizes: Any = None, options: Any = None, **changes: Any):
    sizes = {"pipeline": 2, **(sizes or {})}
    found = run(changed, ranks, changes, model, rows, {**sizes, "schedule": schedule, **(options or {})}, sizes)
    assert_same_step(together(found), alone(model, rows))
    return found


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


SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    check(2, "deep", schedule)


# ranks, model, schedule, rows at a time, sizes, further keys of `parallel`, changes to the training section
CASES: dict[str, tuple[int, str, str, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "four": (4, "deeper", "1f1b", 2, {"pipeline": 4}, {}, {}),
    "four-v": (4, "deeper", "zbv", 2, {"pipeline": 4}, {}, {}),
    "fsdp": (4, "deep", "1f1b", 1, {}, {}, {}),
    "fsdp-freed": (4, "deep", "1f1b", 1, {}, {"reshard": "after_forward"}, {}),
    "fsdp-v": (4, "deep", "zbv", 1, {}, {}, {}),
    "fsdp-v-freed": (4, "deep", "zbv", 1, {}, {"reshard": "after_forward"}, {}),
    "ddp": (4, "deep", "interleaved_zero_bubble", 1, {"replicate": 2}, {}, {}),
    "tied": (2, "deep-tied", "1f1b", 2, {}, {}, {}),
    "tied-v": (2, "deep-tied", "zbv", 2, {}, {}, {}),
    "tied-fsdp": (4, "deep-tied", "interleaved_1f1b", 1, {}, {}, {}),
    "tied-fsdp-v": (4, "deep-tied", "dualpipev", 1, {}, {}, {}),
    "further": (2, "deep-further", "1f1b", 2, {}, {}, {}),
    "further-v": (2, "deep-further", "zbv", 2, {}, {}, {}),
    "further-fsdp": (4, "deep-further", "1f1b", 1, {}, {}, {}),
    "moe": (2, "deep-moe", "1f1b", 2, {}, {}, {}),
    "moe-v": (2, "deep-moe", "zbv", 2, {}, {}, {}),
    "moe-fsdp-v": (4, "deep-moe", "zbv", 1, {}, {}, {}),
    "latent": (2, "deep-latent", "1f1b", 2, {}, {}, {}),
    "latent-v": (2, "deep-latent", "zbv", 2, {}, {}, {}),
    "recompute": (2, "deep", "1f1b", 2, {}, {}, {"activation_checkpointing": "full"}),
    "recompute-v": (2, "deep", "zbv", 2, {}, {}, {"activation_checkpointing": "full"}),
    "selective-v": (2, "deep", "zbv", 2, {}, {}, {"activation_checkpointing": "selective"}),
    "recompute-fsdp-v-freed": (4, "deep", "zbv", 1, {}, {"reshard": "after_forward"}, {"activation_checkpointing": "full"}),
    "dealt": (2, "deep", "1f1b", 2, {}, {"stage_layers": [4, 1]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_one_process(case):
    ranks, model, schedule, rows, sizes, options, changes = CASES[case]
    check(ranks, model, schedule, rows, sizes, options, **changes)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled(schedule, recompute):
    options = {"pipeline": 2, "schedule": schedule}
    changes = {"activation_checkpointing": recompute}
    found = run(compiled, 2, changes, "deep", 2, options, {"pipeline": 2})
    assert_same_step(together(found), alone("deep", 2))
    print(schedule, recompute, [step["graphs"] for step in found])
