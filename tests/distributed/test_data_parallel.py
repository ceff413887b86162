"""Loss and every gradient of FSDP, HSDP and DDP against one process, in fp32."""

import pytest
from distributed_zoo import Case, alone, assert_same_step, steps

DDP = {"replicate": 2}
CASES = {
    "fsdp": Case("plain", 2, {}, 4),
    "fsdp-never": Case("plain", 2, {}, 4, {"reshard": "never"}),
    "ddp": Case("plain", 2, DDP, 4),
    "hsdp": Case("plain", 4, DDP),
    "accumulate": Case("plain", 2, {}, 1),
    "ddp-accumulate": Case("plain", 2, DDP),
    "tied": Case("tied", 2, {}),
    "moe": Case("moe", 2, {}),
    "delta": Case("delta", 2, {}, 4),
    "latent": Case("latent", 2, {}, 4),
    "further": Case("further", 2, {}),
    "uneven": Case("odd", 4, {}),
    "offload": Case("plain", 2, {}, 4, {"cpu_offload": True}),
    "recompute": Case("plain", 2, {}, 4, training={"activation_checkpointing": "full"}),
}
found_in = steps(CASES)


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_that_of_one_process(name):
    case, found = CASES[name], found_in(name)
    assert len({step["here"] for step in found}) > 1, "ranks should have different numbers of targets"
    for step in found:
        assert_same_step(step, alone(case.model, case.rows))
