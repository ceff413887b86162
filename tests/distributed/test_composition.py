"""Three and four kinds of parallelism at once, on eight ranks: loss and every gradient against one process, in fp32.

Rows hold several documents, which end anywhere, in all of them.
"""

from typing import Any

import pytest
from distributed_zoo import Case, alone, assert_same_step, steps, together, without_balance

FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
RING, ULYSSES = {"context_method": "ring"}, {"context_method": "ulysses"}


def case(model: str, rows: int, schedule: str = "1f1b", reshard: str = "auto", training: Any = None, **sizes: Any):
    return Case(model, 8, sizes, rows, {"schedule": schedule, "reshard": reshard}, training or {})


CASES = {
    "pp-fsdp-tp": case("deep-tied", 1, "1f1b", pipeline=2, tensor=2, training=FULL),
    "pp-fsdp-tp-v": case("deep-moe", 1, "zbv", "after_forward", pipeline=2, tensor=2, training=SELECTIVE),
    "pp-fsdp-cp": case("deep-mla", 1, "interleaved_1f1b", pipeline=2, context=2, **RING, training=FULL),
    "pp-tp-cp": case("deep-further", 2, "1f1b", pipeline=2, tensor=2, context=2),
    "pp-tp-cp-v": case("deep-heads", 2, "zbv", pipeline=2, tensor=2, context=2, **ULYSSES, training=FULL),
    "pp-ep-tp-v": case("deep-moe", 1, "dualpipev", pipeline=2, expert=2, tensor=2),
    "pp-ep-cp-tp-v": case("deep-even", 2, "zbv", pipeline=2, expert=2, context=2, tensor=2, training=SELECTIVE),
    "pp-ddp-fsdp": case("deep-tied", 1, "interleaved_zero_bubble", pipeline=2, replicate=2, training=FULL),
    "pp-tp-shared": case("deep-mqa", 2, "interleaved_zero_bubble", pipeline=4, tensor=2),
    "ddp-fsdp-tp": case("experts", 2, replicate=2, tensor=2),
    "fsdp-ep-tp": case("experts", 2, expert=2, tensor=2, training=FULL),
    "fsdp-cp-tp": case("latent", 4, context=2, tensor=2, training=FULL),
}
found_in = steps(CASES)


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_that_of_one_process(name):
    expected = alone(CASES[name].model, CASES[name].rows)
    if "context" in CASES[name].sizes:
        expected = without_balance(expected)
    assert_same_step(together(found_in(name)), expected)
