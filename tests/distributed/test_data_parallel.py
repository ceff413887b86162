"""Loss and every gradient of FSDP, HSDP and DDP against one process, in fp32."""

import pytest
from distributed_zoo import assert_same_step, step_of, step_on_ranks
from harness import run

from treadle.parallel.mesh import Mesh

# model, ranks, sizes, further keys of `parallel`, rows at a time, changes to the training section
CASES = {
    "fsdp": ("plain", 2, {}, {}, 4, {}),
    "fsdp-never": ("plain", 2, {}, {"reshard": "never"}, 4, {}),
    "ddp": ("plain", 2, {"replicate": 2}, {}, 4, {}),
    "hsdp": ("plain", 4, {"replicate": 2}, {}, 2, {}),
    "accumulate": ("plain", 2, {}, {}, 1, {}),
    "ddp-accumulate": ("plain", 2, {"replicate": 2}, {}, 2, {}),
    "tied": ("tied", 2, {}, {}, 2, {}),
    "moe": ("moe", 2, {}, {}, 2, {}),
    "delta": ("delta", 2, {}, {}, 4, {}),
    "latent": ("latent", 2, {}, {}, 4, {}),
    "further": ("further", 2, {}, {}, 2, {}),
    "uneven": ("odd", 4, {}, {}, 2, {}),
    "offload": ("plain", 2, {}, {"cpu_offload": True}, 4, {}),
    "recompute": ("plain", 2, {}, {}, 4, {"activation_checkpointing": "full"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_one_process(case):
    model, ranks, sizes, options, rows, changes = CASES[case]
    expected = step_of(model, Mesh(), rows, **changes)
    found = run(step_on_ranks, ranks, model, rows, options, sizes)
    assert len({step["here"] for step in found}) > 1, "ranks should have different numbers of targets"
    for step in found:
        assert_same_step(step, expected)
