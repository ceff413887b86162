"""Pipelines: loss and every gradient against one process, in fp32, whatever the schedule and whatever it meets."""

from functools import cache
from typing import Any

import pytest
import torch
from distributed_zoo import assert_same_step, step_of, step_on_ranks
from harness import run

from treadle.parallel.mesh import Mesh


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


SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    check(2, "deep", schedule)
