"""Matrices that are cut between processes: loss and every gradient against one process, in fp32."""

import pytest
from distributed_zoo import assert_same_step, step_of, step_on_ranks
from harness import run

from treadle.parallel.mesh import Mesh

# model, ranks, sizes, rows at a time, changes to the training section
CASES = {
    "plain": ("plain", 2, {"tensor": 2}, 4, {}),
    "tied": ("tied", 2, {"tensor": 2}, 8, {}),
    "heads": ("heads", 2, {"tensor": 2}, 8, {}),
    "wide": ("wide", 2, {"tensor": 2}, 8, {}),
    "latent": ("latent", 2, {"tensor": 2}, 8, {}),
    "delta": ("delta", 2, {"tensor": 2}, 8, {}),
    "experts": ("experts", 2, {"tensor": 2}, 4, {}),
    "further": ("further", 2, {"tensor": 2}, 8, {}),
    "shared-heads": ("heads", 4, {"tensor": 4}, 8, {}),
    "shared-wide": ("wide", 4, {"tensor": 4}, 8, {}),
    "shared-delta": ("grouped_delta", 4, {"tensor": 4}, 8, {}),
    "sharded": ("experts", 4, {"shard": 2, "tensor": 2}, 2, {}),
    "copied": ("heads", 4, {"replicate": 2, "tensor": 2}, 2, {}),
    "recomputed": ("experts", 2, {"tensor": 2}, 8, {"activation_checkpointing": "full"}),
    "selective": ("heads", 2, {"tensor": 2}, 8, {"activation_checkpointing": "selective"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_one_process(case):
    model, ranks, sizes, rows, changes = CASES[case]
    expected = step_of(model, Mesh(), rows, **changes)
    for step in run(step_on_ranks, ranks, model, rows, {}, sizes):
        assert_same_step(step, expected)
