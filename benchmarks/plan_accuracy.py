"""How far the dry run's memory is from the device's: the same configurations planned, then trained for a few steps.

    python benchmarks/plan_accuracy.py [--only WORD] [--plan]

Prints one table: configuration, GiB planned of the process that needs most (without overhead), GiB measured
(`max_memory_allocated`, then reserved, then what the process has outside of PyTorch's allocator), error, seconds to
plan. Each measurement is a process of its own, on one GPU. --plan: compare with what docs/benchmarks.md says of one or
two GPUs; needs none.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30
MODELS = Path(__file__).parent.parent / "recipes/models"
LLAMA, QWEN, MOE = "llama-1.5b", "qwen3-0.6b", "moe-2b"
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}


class Case(NamedTuple):
    """measured: GiB, of docs/benchmarks.md for the code as it is; what --plan compares with."""

    model: str
    training: dict[str, Any]
    gpus: int = 1
    parallel: dict[str, Any] = {}
    measured: float | None = None


PIPELINE = {"batch_size": 8, "micro_batch_size": 1}
SHORT = {"batch_size": 8, "sequence_length": 4096}
CASES = {
    "1.5 B, batch 1": Case(LLAMA, {"batch_size": 1}),
    "1.5 B, batch 2": Case(LLAMA, {"batch_size": 2}),
    "1.5 B, batch 4": Case(LLAMA, {"batch_size": 4}, measured=45.7),
    "1.5 B, batch 8 by 4": Case(LLAMA, {"batch_size": 8, "micro_batch_size": 4}),
    "1.5 B, batch 2, eager": Case(LLAMA, {"batch_size": 2, "compile": False}),
    "1.5 B, batch 4, selective": Case(LLAMA, {"batch_size": 4, **SELECTIVE}),
    "1.5 B, batch 4, budget 0.5": Case(
        LLAMA, {"batch_size": 4, "activation_checkpointing": {"kind": "budget", "share": 0.5}}
    ),
    "1.5 B, batch 4, full": Case(LLAMA, {"batch_size": 4, **FULL}),
    "1.5 B, batch 4, full, eager": Case(LLAMA, {"batch_size": 4, "compile": False, **FULL}),
    "1.5 B, batch 4, fp8": Case(LLAMA, {"batch_size": 4, "fp8": True}),
    "0.6 B (Qwen3), batch 8 x 4,096": Case(QWEN, SHORT),
    "0.6 B (Qwen3), 1 x 32,768, selective": Case(QWEN, {"batch_size": 1, "sequence_length": 32768, **SELECTIVE}),
    "dense 0.4 B, batch 8 x 4,096": Case("dense-0.4b", SHORT),
    "mixture of 2 B, batch 8 x 4,096": Case(MOE, SHORT),
    "mixture of 2 B, batch 8 x 4,096, eager": Case(MOE, {**SHORT, "compile": False}),
    "1.5 B, FSDP of 2": Case(LLAMA, {"batch_size": 8, "micro_batch_size": 4}, 2),
    "1.5 B, tensor 2": Case(LLAMA, {"batch_size": 8, "micro_batch_size": 4}, 2, {"tensor": 2}),
    "1.5 B, pipeline 2, 1f1b": Case(LLAMA, PIPELINE, 2, {"pipeline": 2}),
    "1.5 B, pipeline 2, zbv": Case(LLAMA, PIPELINE, 2, {"pipeline": 2, "schedule": "zbv"}),
    "1.5 B, pipeline 2, dualpipev": Case(LLAMA, PIPELINE, 2, {"pipeline": 2, "schedule": "dualpipev"}),
}


def configuration(name: str) -> Any:
    from treadle.config import read_yaml, resolve
    from treadle.memory.dry_run import DryRunConfig

    case = CASES[name]
    model = read_yaml(MODELS / f"{case.model}.yaml")
    model["max_length"] = max(model["max_length"], case.training.get("sequence_length", 8192))
    training = {"steps": 4, "sequence_length": 8192, **case.training}
    return resolve(DryRunConfig, {"model": model, "training": training, "parallel": case.parallel})


def plan(name: str) -> dict[str, Any]:
    from treadle.memory.dry_run import dry_run

    start = time.perf_counter()
    found = max(dry_run(configuration(name), CASES[name].gpus), key=lambda rank: rank.footprint.total)
    return {
        "planned": found.footprint.total,
        "plan_seconds": time.perf_counter() - start,
        "moment": found.moment,
        "categories": dict(found.footprint),
    }


def measure(name: str) -> dict[str, Any]:
    import torch
    from train_single import random_batches

    from treadle.parallel.mesh import Mesh
    from treadle.train.loop import Loop
    from treadle.train.losses import cross_entropy
    from treadle.train.schedules import ConstantConfig
    from treadle.train.setup import build_model, build_state

    config, device = configuration(name), torch.device("cuda", 0)
    training = config.training
    mesh = Mesh(device=device)
    state = build_state(build_model(config.model, training, seed=0, mesh=mesh), config.optimizer, training)
    loop = Loop(state, training, ConstantConfig(warmup=1), cross_entropy, mesh=mesh)
    batches = random_batches(training.rows, training.sequence_length, config.model.vocab_size, 8, document=None)
    each = training.batch_size // training.rows
    steps = [[batch for step in batches[:each] for batch in step] for _ in range(training.steps)]
    loop.run(steps[: training.steps - 1] + steps[-1:])
    own = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
    ).stdout
    used = [
        int(line.split(",")[1]) * 2**20 for line in own.splitlines() if line.split(",")[0].strip() == str(os.getpid())
    ]
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "outside": used[0] - torch.cuda.memory_reserved() if used else math.nan,
    }


def in_process(what: str, name: str) -> dict[str, Any]:
    """`plan` or `measure` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, f"--{what}-one", name], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--plan", action="store_true", help="do not measure")
    parser.add_argument("--jobs", type=int, default=2, help="plans at a time")
    parser.add_argument("--plan-one", help=argparse.SUPPRESS)
    parser.add_argument("--measure-one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for one, function in ((arguments.plan_one, plan), (arguments.measure_one, measure)):
        if one:
            print(json.dumps(function(one)))
            return
    names = [name for name in CASES if arguments.only in name]
    room = Room(0 if arguments.plan else device_bytes())

    def both(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        p, known = in_process("plan", name), CASES[name].measured
        if arguments.plan or "error" in p or CASES[name].gpus > 1:
            return p, {} if known is None else {"allocated": known * GIB}
        with room.taken(int(1.15 * p["planned"]) + 2 * GIB):
            return p, in_process("measure", name)

    print("| configuration | planned GiB | allocated GiB | error | reserved GiB | outside GiB | seconds to plan |")
    print("|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for name, (p, m) in zip(names, pool.map(both, names), strict=True):
            print(f"| {name} | {' | '.join(cells(p, m))} |", flush=True)


def cells(p: dict[str, Any], m: dict[str, Any]) -> list[str]:
    if "error" in p or "error" in m:
        return [p.get("error", ""), m.get("error", ""), "", "", "", ""]
    found = [f"{p['planned'] / GIB:.2f}", "", "", "", ""]
    if m:
        found[1:] = [f"{m['allocated'] / GIB:.2f}", f"{p['planned'] / m['allocated'] - 1:+.1%}"]
        found += [f"{m[key] / GIB:.2f}" if key in m else "" for key in ("reserved", "outside")]
    return [*found, f"{p['plan_seconds']:.1f}"]


def device_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[1])


class Room:
    """Device memory that measurements share: each waits until what it is planned to take is free."""

    def __init__(self, size: int):
        self.free, self.changed = size, threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


if __name__ == "__main__":
    main()
