"""fp8 under each layout against one process, in fp32: scales have to be the same ones, and so roundings are."""

from typing import Any

import pytest
from distributed_zoo import assert_same_step, step_of, step_on_ranks
from harness import run

from treadle.parallel.mesh import Mesh

FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}

# model, ranks, sizes, rows at a time, further keys of `parallel`, changes to the training section
CASES: dict[str, tuple[str, int, dict[str, int], int, dict[str, Any], dict[str, Any]]] = {
    "fsdp": ("plain", 2, {}, 4, {}, {}),
    "ddp": ("plain", 2, {"replicate": 2}, 4, {}, {}),
    "tensor": ("sixteen", 2, {"tensor": 2}, 8, {}, {}),
    "tensor-fsdp": ("sixteen", 4, {"tensor": 2}, 4, {}, {}),
    "tensor-selective": ("sixteen", 2, {"tensor": 2}, 8, {}, SELECTIVE),
    "pipeline": ("deep", 2, {"pipeline": 2}, 2, {"schedule": "1f1b"}, {}),
    "zero-bubble": ("deep", 2, {"pipeline": 2}, 2, {"schedule": "zbv"}, {}),
    "zero-bubble-full": ("deep", 2, {"pipeline": 2}, 2, {"schedule": "zbv"}, FULL),
}


def step(changes: dict[str, Any], *arguments: Any) -> Any:
    return step_on_ranks(*arguments, fp8=True, **changes)


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_one_process(case):
    model, ranks, sizes, rows, options, changes = CASES[case]
    expected = step_of(model, Mesh(), rows, fp8=True)
    plain = step_of(model, Mesh(), rows)
    assert abs(plain["loss"] - expected["loss"]) > 1e-5, "fp8 should make a difference"
    found = run(step, ranks, changes, model, rows, {**sizes, **options}, sizes)
    merged = {**found[0], "gradients": {}, "initial": {}}
    for each in found:  # a stage has its own
        merged["gradients"] |= each["gradients"]
        merged["initial"] |= each["initial"]
    assert_same_step(merged, expected)
