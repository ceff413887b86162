"""How far plans are from the device: the same configurations planned by both engines, and trained for a few steps.

    python benchmarks/plan_accuracy.py --measure --gpus 1 --json plan_gpu1.json   # on a GPU; then --gpus 2 on two
    python benchmarks/plan_accuracy.py --json plan_gpu1.json plan_gpu2.json       # anywhere: plans, and compares;
                                                                                  # also what train_parallel.py wrote
    python benchmarks/plan_accuracy.py --measure --gpus 2 --tiny                  # tiny models, on CPUs: does it run?

Each measurement is so many processes of its own, with a time limit; one that fails does not stop the others, and what
--json has is not measured again.

The table: of the process that needs most, GiB allocated (`max_memory_allocated`), planned in closed form and by the dry
run, each with its error; reserved by PyTorch, and in use outside of it (CUDA, NCCL); tokens/s, planned, its error.
"""

import argparse
import json
import linecache
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import train_parallel
from measure import Benchmark, measure
from processes import measure_all, recorded, run_processes
from train_parallel import MODELS, TINY_FEEDFORWARD, TINY_LAYERS, layouts

from treadle.config import read_yaml, resolve, to_dict
from treadle.errors import TreadleError
from treadle.memory.calibrate import calibrate
from treadle.memory.devices import Device
from treadle.memory.devices import find_device as known_device
from treadle.memory.dry_run import dry_run
from treadle.memory.plan import GIB, Plan
from treadle.memory.predict import Planned, predict
from treadle.parallel.activation_checkpointing import offloads
from treadle.parallel.mesh import World, find_device, open_mesh
from treadle.train.loop import Callback, Loop, StepRecord

CALIBRATION = "calibration"  # comes first: what `treadle plan --calibrate` measures
STEPS = (2, 3, 1)  # not timed, timed, watched
LARGEST = 14  # of what is there at the peak


class Case(NamedTuple):
    model: str
    training: dict[str, Any]
    parallel: dict[str, Any] = {}


LLAMA, QWEN, MOE = "llama-1.5b", "qwen3-0.6b", "moe-2b"
FOUR: dict[str, Any] = {"batch_size": 4}
BY_FOUR: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4}
BY_ONE: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 1}
SHORT: dict[str, Any] = {"batch_size": 8, "sequence_length": 4096}
LONG: dict[str, Any] = {"batch_size": 1, "sequence_length": 32768}


def keeping(kind: Any) -> dict[str, Any]:
    return {"activation_checkpointing": kind}


# By number of GPUs, the most important first.
CASES: dict[int, dict[str, Case]] = {
    1: {
        "batch 4": Case(LLAMA, FOUR),
        "batch 1": Case(LLAMA, {"batch_size": 1}),
        "batch 2": Case(LLAMA, {"batch_size": 2}),
        "batch 4, full": Case(LLAMA, {**FOUR, **keeping("full")}),
        "batch 4, selective": Case(LLAMA, {**FOUR, **keeping("selective")}),
        "batch 4, fp8": Case(LLAMA, {**FOUR, "fp8": True}),
        "mixture of 2 B, 8 x 4,096": Case(MOE, SHORT),
        "Qwen3 0.6 B, 8 x 4,096": Case(QWEN, SHORT),
        "1 x 32,768": Case(LLAMA, LONG),
        "batch 4, budget 0.5": Case(LLAMA, {**FOUR, **keeping({"kind": "budget", "share": 0.5})}),
        "batch 4, offload": Case(LLAMA, {**FOUR, **keeping("offload")}),
        "batch 8 by 4": Case(LLAMA, BY_FOUR),
        "batch 2, eager": Case(LLAMA, {"batch_size": 2, "compile": False}),
        "dense 0.4 B, 8 x 4,096": Case("dense-0.4b", SHORT),
        "batch 4, full, eager": Case(LLAMA, {**FOUR, "compile": False, **keeping("full")}),
        "mixture of 2 B, 8 x 4,096, eager": Case(MOE, {**SHORT, "compile": False}),
        "batch 4, fp8, full": Case(LLAMA, {**FOUR, "fp8": True, **keeping("full")}),
        "1 x 32,768, selective": Case(LLAMA, {**LONG, **keeping("selective")}),
    },
    2: {
        "FSDP": Case(LLAMA, BY_FOUR),
        "tensor": Case(LLAMA, BY_FOUR, {"tensor": 2}),
        "1f1b": Case(LLAMA, BY_ONE, {"pipeline": 2}),
        "mixture of 2 B, expert": Case(MOE, {"batch_size": 16, "sequence_length": 4096}, {"expert": 2}),
        "context, 32,768": Case(LLAMA, LONG, {"context": 2}),
        "zbv": Case(LLAMA, BY_ONE, {"pipeline": 2, "schedule": "zbv"}),
        "FSDP, full": Case(LLAMA, {"batch_size": 8, **keeping("full")}),
        "mixture of 2 B, FSDP": Case(MOE, {"batch_size": 16, "sequence_length": 4096}),
        "context by ring, 32,768": Case(LLAMA, LONG, {"context": 2, "context_method": "ring"}),
        "context by heads, 32,768": Case(LLAMA, LONG, {"context": 2, "context_method": "ulysses"}),
        "dualpipev": Case(LLAMA, BY_ONE, {"pipeline": 2, "schedule": "dualpipev"}),
        "tensor, asynchronous": Case(LLAMA, BY_FOUR, {"tensor": 2, "async_tensor": True}),
        "FSDP of micro-batches": Case(LLAMA, {"batch_size": 8, "micro_batch_size": 2}),
    },
}


def configuration(case: Case, tiny: bool = False) -> Benchmark:
    model = read_yaml(MODELS / f"{case.model}.yaml")
    training = {"steps": sum(STEPS), "sequence_length": 8192, **case.training}
    if tiny:
        feedforward = TINY_FEEDFORWARD.get(case.model, {"kind": "gated", "dim": 128})
        model = {"dim": 64, "vocab_size": 512, "layers": [{**TINY_LAYERS, "feedforward": feedforward}]}
        training |= {"sequence_length": training["sequence_length"] // 128, "precision": "fp32", "compile": False}
        training["fp8"] = False
        if case.training.get("activation_checkpointing", {}) == {"kind": "budget", "share": 0.5}:
            training |= keeping("full")  # eagerly there is nobody to choose
    model["max_length"] = max(model.get("max_length", 0), training["sequence_length"])
    return resolve(Benchmark, {"model": model, "training": training, "parallel": case.parallel})


class AtPeak(Callback):
    """Takes down every allocation of the last step."""

    def __init__(self) -> None:
        self.trace: list[dict[str, Any]] = []
        self.now = 0  # bytes at its end

    def step(self, loop: Loop, record: StepRecord) -> None:
        if loop.device.type != "cuda":
            return
        left = loop.config.steps - record.step
        if left == 1:
            torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=1_000_000)
        elif left == 0:
            self.now = torch.cuda.memory_allocated(loop.device)
            self.trace = torch.cuda.memory._snapshot()["device_traces"][loop.device.index or 0]
            torch.cuda.memory._record_memory_history(enabled=None)


def at_peak(trace: list[dict[str, Any]], now: int) -> dict[str, Any]:
    """What lived when most did, by the lines that had asked for it. now: bytes at the end of the trace."""
    signs = {"alloc": 1, "free_requested": -1}
    events = [event for event in trace if event["action"] in signs]
    total = most = before = now - sum(signs[event["action"]] * event["size"] for event in events)
    when = 0
    for number, event in enumerate(events, start=1):
        total += signs[event["action"]] * event["size"]
        if total > most:
            most, when = total, number
    live: dict[int, dict[str, Any]] = {}
    for event in events[:when]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif live.pop(event["addr"], None) is None:
            before -= event["size"]
    sizes: dict[str, list[int]] = defaultdict(list)
    for event in live.values():
        sizes[_place(event.get("frames", ()))].append(event["size"])
    places = sorted(((sum(each), len(each), place) for place, each in sizes.items()), reverse=True)[:LARGEST]
    return {
        "peak_of_step_gib": most / GIB,
        "from_before_gib": before / GIB,
        "asked_last": _place(events[when - 1].get("frames", ())) if when else "",
        "at_peak": [(round(size / GIB, 4), count, place) for size, count, place in places],
    }


def _place(frames: Any) -> str:
    """The innermost line that is not PyTorch's own, and the innermost of Treadle's."""
    told = []
    for kind in (lambda name: "/torch/" not in name, lambda name: "/treadle/" in name):
        frame = next((frame for frame in frames if kind(frame["filename"])), None)
        if frame is not None:
            line = linecache.getline(frame["filename"], frame["line"]).strip()[:110]
            place = f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}: {line}"
            told += [place] * (place not in told)
    return " < ".join(told) or (frames[0]["name"] if frames else "unknown")


def one_process(case: Case, tiny: bool, answer: Path) -> None:
    """A rank's part; the leader writes what was found."""
    config, world = configuration(case, tiny), World.here()
    device = find_device("cpu" if tiny else "auto", world)
    watched = AtPeak()
    with open_mesh(config.parallel.layout(world.size), device) as mesh:
        result = measure(config, mesh, warmup=STEPS[0], callbacks=[watched])
        if mesh.leads:
            answer.write_text(json.dumps(result))
            if watched.trace:  # of the leader; of a pipeline's other stages `peaks_gib` alone tells
                answer.write_text(json.dumps(result | at_peak(watched.trace, watched.now)))


def calibration(tiny: bool, answer: Path) -> None:
    device = find_device("cpu" if tiny else "auto")
    found = to_dict(calibrate(device, seconds=0.2 if tiny else 0.8))
    answer.write_text(json.dumps({"constants": found, "losses": [], "tokens_per_second": 0.0, "peak_gib": None}))


def planned_as(result: dict[str, Any]) -> Planned:
    """What was measured, here or by train_parallel.py."""
    name, gpus = result["layout"], result["gpus"]
    if name in CASES[gpus]:
        config = configuration(CASES[gpus][name])
    else:
        runs = [layouts(number).get(name) for number in (2, 4, 8)]
        config = train_parallel.configuration(
            next(run for run in runs if run is not None and run.shape.rows == result["batch"]), tiny=False
        )
    return Planned(model=config.model, training=config.training, parallel=config.parallel)


def compared(measured: dict[str, Any], closed: Plan, dry: float | None) -> tuple[str, ...]:
    """A row of the table. dry: GiB at the peak by the dry run, where it can tell."""
    peak, speed = measured["peak_gib"], measured["tokens_per_second"]
    found = closed.allocated / GIB
    return (
        f"{peak:.2f}",
        *(f"{found:.2f}", f"{found / peak - 1:+.1%}"),
        *((f"{dry:.2f}", f"{dry / peak - 1:+.1%}") if dry else ("-", "-")),
        f"{measured['reserved_gib']:.2f}",
        f"{measured['outside_gib']:.2f}" if "outside_gib" in measured else "-",
        f"{speed:,.0f}",
        f"{closed.tokens_per_second:,.0f}",
        f"{closed.tokens_per_second / speed - 1:+.0%}",
    )


def calibrated(result: dict[str, Any]) -> Device | None:
    """The device that a calibration found; of one alone the link is not measured, and stays the data sheet's."""
    if "constants" not in result:
        return None
    device, known = Device(**result["constants"]), known_device(result["constants"]["name"])
    link = {key: getattr(known, key) for key in ("per_node", "link_gbs", "latency_us")}
    return device.model_copy(update=link) if device.per_node == 1 else device


def compare(files: list[Path], jobs: int) -> None:
    results = [result for file in files for result in recorded(file).values()]
    devices = {device.name: device for device in map(calibrated, results) if device is not None}
    heads = ("configuration", "GPUs", "GiB", "closed form", "error", "dry run", "error", "reserved", "outside")
    heads += ("tokens/s", "planned", "error")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    done = [result for result in results if "gpus" in result]
    configs = {result["layout"]: planned_as(result) for result in done}

    def dry(result: dict[str, Any]) -> float | None:
        config = configs[result["layout"]]
        if offloads(config.training.activation_checkpointing):
            return None
        return max(rank.footprint.total for rank in dry_run(config, result["gpus"])) / GIB  # type: ignore[arg-type]

    with ThreadPoolExecutor(jobs) as pool:
        for result, found in zip(done, pool.map(dry, done), strict=True):
            device = devices.get(result["device"]) or known_device(result["device"])
            closed = predict(configs[result["layout"]], result["gpus"], device)
            cells = result["layout"], str(result["gpus"]), *compared(result, closed, found)
            print(f"| {' | '.join(cells)} |", flush=True)
    for result in results:
        if "failed" in result:
            print(f"{result['layout']}: {result['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train, on --gpus; without, plan and compare")
    parser.add_argument("--gpus", type=int, choices=tuple(CASES), default=1)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="tiny models on CPUs")
    parser.add_argument("--json", type=Path, nargs="*", default=[], help="files of results; --measure appends to one")
    parser.add_argument("--logs", type=Path, default=Path("runs/plan_accuracy"), help="what processes print")
    parser.add_argument("--timeout", type=float, default=75.0, help="seconds for each configuration")
    parser.add_argument("--seconds", type=float, default=570.0, help="start nothing that might end after so many")
    parser.add_argument("--jobs", type=int, default=1, help="plans at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = CASES[arguments.gpus]
    if arguments.one is not None:
        if arguments.one == CALIBRATION:
            calibration(arguments.tiny, arguments.answer)
            return
        try:
            one_process(cases[arguments.one], arguments.tiny, arguments.answer)
        except TreadleError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        return
    if not arguments.measure:
        compare(arguments.json, arguments.jobs)
        return
    command = [sys.executable, __file__, "--gpus", str(arguments.gpus), *(["--tiny"] if arguments.tiny else [])]

    def start(name: str, seconds: float) -> dict[str, Any]:
        folder = arguments.logs / f"{arguments.gpus}-{''.join(c if c.isalnum() else '-' for c in name)}"
        number = 1 if name == CALIBRATION else arguments.gpus
        return run_processes([*command, "--one", name], number, folder, seconds)

    file = arguments.json[0] if arguments.json else None
    names = [name for name in (CALIBRATION, *cases) if arguments.only in name]
    for result in measure_all(names, start, file, timeout=arguments.timeout, seconds=arguments.seconds).values():
        if "losses" in result and result["peak_gib"]:
            peaks = ", ".join(f"{peak:.2f}" for peak in result["peaks_gib"])
            print(f"| {result['layout']} | {peaks} GiB | {result['tokens_per_second']:,.0f} tokens/s |", flush=True)


if __name__ == "__main__":
    main()
