"""Several processes on GPUs, against one process: what their streams, NCCL and symmetric memory make of it.

Each has a GPU of its own where there are enough. Else they share one, which NCCL refuses to processes of one machine.
Told that each is a machine by itself, it takes them, and talks through sockets: the same operations and streams at
another speed. Nothing here says how fast anything is.
"""

import faulthandler
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_zoo import step_of
from harness import meshed, run
from test_run_together import STEPS, records, train, workplace  # noqa: F401

from treadle.parallel.config import ParallelConfig
from treadle.parallel.mesh import Mesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICE, SECONDS = "cuda", 100.0

# model, ranks, sizes, further keys of `parallel`, rows at a time, changes to the training section
BF16, COMPILED = {"precision": "bf16"}, {"precision": "bf16", "compile": True}
FULL = COMPILED | {"activation_checkpointing": "full"}
RING, ULYSSES = {"context_method": "ring"}, {"context_method": "ulysses"}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], int, dict[str, Any]]] = {
    "fsdp": ("gpu", 2, {}, {}, 2, {}),
    "fsdp-compiled": ("gpu", 2, {}, {}, 2, FULL),
    "ddp": ("gpu", 2, {"replicate": 2}, {"reshard": "never"}, 2, BF16),
    "offload": ("gpu", 2, {}, {"cpu_offload": True}, 2, BF16),
    "tensor": ("gpu", 2, {"tensor": 2}, {}, 4, {}),
    "tensor-compiled": ("gpu", 2, {"tensor": 2}, {}, 4, COMPILED),
    "async-tensor": ("gpu", 2, {"tensor": 2}, {"async_tensor": True}, 4, {}),
    "async-tensor-compiled": ("gpu", 2, {"tensor": 2}, {"async_tensor": True}, 4, COMPILED),
    "pipeline": ("gpu", 2, {"pipeline": 2}, {"pipeline": 2}, 1, {}),
    "zbv": ("gpu", 2, {"pipeline": 2}, {"pipeline": 2, "schedule": "zbv"}, 1, {}),
    "dualpipev-compiled": ("gpu", 2, {"pipeline": 2}, {"pipeline": 2, "schedule": "dualpipev"}, 1, COMPILED),
    "gather": ("gpu", 2, {"context": 2}, {}, 4, BF16),
    "gather-compiled": ("gpu", 2, {"context": 2}, {}, 4, FULL),
    "gather-latent": ("gpu-latent", 2, {"context": 2}, {}, 4, BF16),
    "ring": ("gpu", 2, {"context": 2} | RING, {}, 4, {}),
    "ring-compiled": ("gpu", 2, {"context": 2} | RING, {}, 4, COMPILED),
    "ulysses": ("gpu", 2, {"context": 2} | ULYSSES, {}, 4, BF16),
    "expert": ("gpu-moe", 2, {"expert": 2}, {}, 4, {}),
    "expert-compiled": ("gpu-moe", 2, {"expert": 2}, {}, 4, COMPILED),
    "pipeline-tensor": ("gpu", 4, {"pipeline": 2, "tensor": 2}, {"pipeline": 2}, 1, BF16),
    "fsdp-tensor-context": ("gpu", 4, {"tensor": 2, "context": 2}, {}, 4, BF16),
}


def take_gpu() -> str:
    """The device of this rank. What hangs says where."""
    faulthandler.dump_traceback_later(SECONDS - 10)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.device_count() < ranks:
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        talk = {"NCCL_HOSTID": f"machine-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        shared = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
        os.environ.update(alone | talk | shared)
        rank = 0
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def step(model: str, rows: int, sizes: dict[str, Any], options: dict[str, Any], changes: dict[str, Any]) -> Any:
    with meshed(take_gpu(), **sizes) as mesh:
        return step_of(model, mesh, rows, ParallelConfig(**options), **changes)


@cache
def exact(model: str) -> dict[str, Any]:
    return step_of(model, Mesh(device=torch.device(DEVICE)), 4, sequence_length=128)


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_one_process(case: str) -> None:
    model, ranks, sizes, options, rows, changes = CASES[case]
    expected = exact(model)
    steps = run(step, ranks, model, rows, sizes, options, {"sequence_length": 128, **changes}, seconds=SECONDS)
    limit, worst = (3e-2, 0.0) if "precision" in changes else (2e-5, 0.0)
    for found in steps:
        assert found["tokens"] == expected["tokens"]
        assert abs(found["loss"] - expected["loss"]) < limit / 3
        assert abs(found["norm"] / expected["norm"] - 1) < limit
        for name, grad in found["gradients"].items():
            right = expected["gradients"][name]
            assert torch.equal(found["initial"][name], expected["initial"][name]), f"{name} starts otherwise"
            error = ((grad - right).norm() / right.norm()).item()
            assert error < limit, f"{name}: {error:.1e}"
            worst = max(worst, error)
    assert {name for found in steps for name in found["gradients"]} == expected["gradients"].keys()
    print(f"{case}: gradients to {worst:.1e}, loss to {abs(steps[0]['loss'] - expected['loss']):.1e}")


def trained(*arguments: Any) -> None:
    take_gpu()
    train(*arguments)


def test_a_recipe_stops_and_goes_on_in_another_layout(workplace: Path) -> None:  # noqa: F811
    """Training, evaluation, samples and checkpoints, with the losses of one process on the CPU."""
    keys = [f"device={DEVICE}"]
    run(trained, 2, workplace, "gpu", [*keys, "parallel.tensor=2"], False, (1, 3), seconds=SECONDS)
    assert json.loads((workplace / "gpu/status.json").read_text())["state"] == "interrupted"
    run(trained, 2, workplace, "gpu", [*keys, "parallel.pipeline=2", "parallel.tensor=1"], True, seconds=SECONDS)
    assert [r["step"] for r in records(workplace / "gpu")] == [*range(1, STEPS + 1)]
    for kind, key in (("train", "loss"), ("evaluate", "bits_per_byte")):
        for mine, right in zip(records(workplace / "gpu", kind), records(workplace / "one", kind), strict=True):
            assert mine[key] == pytest.approx(right[key], abs=1e-4)
