"""What waits on the host, or is recomputed of some layers only, under each layout: the same step as without."""

from typing import Any

import pytest
from distributed_zoo import assert_same_step, step_of, step_on_ranks
from harness import run

from treadle.parallel import activation_offload
from treadle.parallel import compile as compilation
from treadle.parallel.mesh import Mesh

OFFLOAD, INPUTS, HALF = "offload", {"kind": "full", "offload": True}, {"kind": "full", "every": 2}
BUDGET = {"kind": "budget", "share": 0.3}

# model, ranks, sizes, rows at a time, further keys of `parallel`, what is kept, compiled
CASES: dict[str, tuple[str, int, dict[str, int], int, dict[str, Any], Any, bool]] = {
    "fsdp": ("plain", 2, {}, 4, {}, OFFLOAD, False),
    "fsdp-inputs": ("plain", 2, {}, 2, {}, INPUTS, False),
    "fsdp-half": ("plain", 2, {}, 4, {}, HALF, False),
    "fsdp-compiled": ("plain", 2, {}, 4, {}, OFFLOAD, True),
    "fsdp-budget": ("plain", 2, {}, 4, {}, BUDGET, True),
    "experts": ("moe", 2, {"expert": 2}, 4, {}, OFFLOAD, True),
    "tensor": ("plain", 2, {"tensor": 2}, 4, {}, OFFLOAD, False),
    "tensor-compiled": ("plain", 2, {"tensor": 2}, 4, {}, INPUTS, True),
    "tensor-budget": ("plain", 2, {"tensor": 2}, 4, {}, BUDGET, True),
    "pipeline": ("deep", 2, {"pipeline": 2}, 2, {"schedule": "1f1b"}, OFFLOAD, False),
    "pipeline-half": ("deep", 2, {"pipeline": 2}, 2, {"schedule": "1f1b"}, HALF, False),
    "zero-bubble": ("deep", 2, {"pipeline": 2}, 2, {"schedule": "zbv"}, INPUTS, False),
    "zero-bubble-budget": ("deep", 2, {"pipeline": 2}, 2, {"schedule": "zbv"}, BUDGET, True),
}


def step(changes: dict[str, Any], *arguments: Any) -> Any:
    """And, for each run of a layer, how many storages were copied to the host, and their bytes."""
    for function in (compilation.compile_layers, compilation.compile_between):
        function.__kwdefaults__["backend"] = "aot_eager"
    activation_offload.SMALL = 0
    sent, plain = [], activation_offload._Kept.send

    def counting(self: Any) -> None:
        plain(self)
        sent.append((len(self.host), sum(copy.numel() for copy in self.host.values())))

    activation_offload._Kept.send = counting  # type: ignore[method-assign]
    return step_on_ranks(*arguments, **changes), sent


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_one_process(case):
    model, ranks, sizes, rows, options, kept, compiled = CASES[case]
    expected = step_of(model, Mesh(), rows)
    changes = {"activation_checkpointing": kept, "compile": compiled}
    found = run(step, ranks, changes, model, rows, {**sizes, **options}, sizes)
    merged = {**found[0][0], "gradients": {}, "initial": {}}
    for each, sent in found:  # a stage has its own
        merged["gradients"] |= each["gradients"]
        merged["initial"] |= each["initial"]
        if kept in (OFFLOAD, INPUTS):
            assert sum(storages for storages, _ in sent) > 0
        else:
            assert not sent
    assert_same_step(merged, expected)


def test_gathered_weights_stay_where_they_are():
    arguments = ({"activation_checkpointing": OFFLOAD}, "plain", 4, {}, {})
    ((_, alone),) = run(step, 1, *arguments)
    for _, sent in run(step, 2, *arguments):
        assert sent == alone[: len(sent)]  # of half as many micro-batches
        assert sent
