"""Layouts of several GPUs beside one GPU: the real loop on the same tokens, one layout after the other.

    python benchmarks/train_parallel.py --gpus 2 --json results.jsonl      # 4, 8; --layouts t1-fsdp,t1-tensor
    python benchmarks/train_parallel.py --gpus 2 --tiny                    # tiny models, on CPUs

Each layout is so many processes of its own, with a time limit; one that fails does not stop the others. What --json
has is not measured again, so that a run which ends at --seconds goes on with the same command.

Prints one table. scaling: tokens/s over that of one GPU times their number. peak: of the process that needs the most.
idle: share of a step in which a process computes nothing, mean and largest, traced: what a pipeline waits, and what is
sent while nothing else is done. loss: of the last step, which counts the same tokens in every layout of a shape, and
its difference to the first layout of that shape. bf16 rounds differently in each layout; fp32 (--tiny) agrees to 1e-5.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import Benchmark, measure
from processes import measure_all, run_processes

from treadle.config import read_yaml, resolve
from treadle.errors import TreadleError
from treadle.parallel.mesh import World, find_device, open_mesh

MODELS = Path(__file__).parent.parent / "recipes/models"
TINY_LAYERS = {"kind": "pre_norm", "repeat": 8, "mixer": {"kind": "attention", "heads": 8, "kv_heads": 4}}
TINY_FEEDFORWARD = {
    "moe-2b": {"kind": "moe", "experts": 8, "top_k": 2, "dim": 32, "balance_loss": 0.01, "z_loss": 0.001}
}


@dataclass(frozen=True)
class Shape:
    """What is trained, whatever the layout: rows of the global batch, and their tokens."""

    model: str
    length: int
    rows: int
    recompute: str = "none"
    steps: tuple[int, int] = (2, 4)  # not timed, timed


@dataclass(frozen=True)
class LayoutRun:
    """gpus: processes. at_a_time: rows of a micro-batch."""

    shape: Shape
    gpus: int
    at_a_time: int
    parallel: dict[str, Any] = field(default_factory=dict)


def layouts(gpus: int) -> dict[str, LayoutRun]:
    """Those for so many GPUs, the most important first; of each shape the one that others are compared with first."""
    t1, moe = Shape("llama-1.5b", 8192, 4 * gpus), Shape("moe-2b", 4096, 8 * gpus)
    large = Shape("llama-3-8b", 8192, 2 * gpus, "full" if gpus == 2 else "selective")
    long = Shape("llama-1.5b", 32_768, 1, steps=(2, 3))
    longest = Shape("llama-1.5b", 131_072, 1, "full", steps=(1, 2))
    asynchronous, zbv, dual = {"async_tensor": True}, {"schedule": "zbv"}, {"schedule": "dualpipev"}
    two, two_stages, cut = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "shard": gpus // 2}
    runs = {"t1-one": LayoutRun(t1, 1, 4), "t1-fsdp": LayoutRun(t1, gpus, 4)}
    if gpus == 2:
        return runs | {
            "t1-fsdp-kept": LayoutRun(t1, 2, 4, {"reshard": "never"}),
            "t1-tensor": LayoutRun(t1, 2, 4, two),
            "t1-async-tensor": LayoutRun(t1, 2, 4, two | asynchronous),
            "t1-1f1b": LayoutRun(t1, 2, 1, two_stages),
            "t1-zbv": LayoutRun(t1, 2, 1, two_stages | zbv),
            "t1-dualpipev": LayoutRun(t1, 2, 1, two_stages | dual),
            "moe-one": LayoutRun(moe, 1, 8),
            "moe-fsdp": LayoutRun(moe, 2, 8),
            "moe-expert": LayoutRun(moe, 2, 8, {"expert": 2}),
            "32k-one": LayoutRun(long, 1, 1),
            **{f"32k-{way}": LayoutRun(long, 2, 1, _context(2, way)) for way in ("gather", "ulysses", "ring")},
            "t1-ddp": LayoutRun(t1, 2, 4, {"replicate": 2}),
            "8b-fsdp": LayoutRun(large, 2, 1),
            "8b-tensor": LayoutRun(large, 2, 1, two),
            "128k-one": LayoutRun(longest, 1, 1),
            **{f"128k-{way}": LayoutRun(longest, 2, 1, _context(2, way)) for way in ("gather", "ulysses", "ring")},
        }
    runs |= {
        "8b-fsdp": LayoutRun(large, gpus, 2),
        "8b-fsdp-tensor": LayoutRun(large, gpus, 2, cut),
        "8b-fsdp-async-tensor": LayoutRun(large, gpus, 2, cut | asynchronous),
        "t1-fsdp-tensor": LayoutRun(t1, gpus, 4, cut),
        "moe-one": LayoutRun(moe, 1, 8),
        "moe-fsdp": LayoutRun(moe, gpus, 8),
        "moe-fsdp-expert": LayoutRun(moe, gpus, 8, {"expert": gpus}),
        "128k-fsdp-gather": LayoutRun(longest, gpus, 1, _context(gpus, "gather")),
    }
    for schedule in ("1f1b", "zbv", "dualpipev"):
        chosen = {"schedule": schedule}
        runs[f"t1-fsdp-{schedule}"] = LayoutRun(t1, gpus, 1, two_stages | chosen)
        runs[f"t1-tensor-{schedule}"] = LayoutRun(t1, gpus, 1, cut | two_stages | chosen | {"shard": gpus // 4})
        runs[f"8b-{schedule}"] = LayoutRun(large, gpus, 1, {"pipeline": gpus // 2} | chosen)
    return runs | {
        "8b-fsdp-gather": LayoutRun(large, gpus, 2, {"context": 2}),
        # Four ways at a time: stages, rows, matrices, experts.
        "moe-four-ways": LayoutRun(moe, gpus, 4, two_stages | two | {"shard": gpus // 4, "expert": gpus // 4}),
        "t1-context-tensor": LayoutRun(t1, gpus, 4, {"context": 2, "tensor": 2}),
        "t1-hsdp": LayoutRun(t1, gpus, 4, {"replicate": 2}),
        "t1-tensor-all": LayoutRun(t1, gpus, 4, {"tensor": gpus}),
    }


def _context(size: int, method: str) -> dict[str, Any]:
    return {"context": size, "context_method": method}


def configuration(run: LayoutRun, tiny: bool) -> Benchmark:
    shape, length = run.shape, run.shape.length
    model = read_yaml(MODELS / f"{shape.model}.yaml")
    training = {"steps": sum(shape.steps), "batch_size": shape.rows, "micro_batch_size": run.at_a_time}
    if tiny:
        length //= 128
        feedforward = TINY_FEEDFORWARD.get(shape.model, {"kind": "gated", "dim": 128})
        model = {"dim": 64, "vocab_size": 512, "layers": [{**TINY_LAYERS, "feedforward": feedforward}]}
        training |= {"precision": "fp32", "compile": False}
    training |= {"sequence_length": length, "activation_checkpointing": shape.recompute}
    source = {"model": {**model, "max_length": length}, "training": training, "parallel": run.parallel}
    return resolve(Benchmark, source, [])


def one_process(run: LayoutRun, tiny: bool, answer: Path) -> None:
    """A rank's part; the leader writes what was found."""
    config, world = configuration(run, tiny), World.here()
    device = find_device("cpu" if tiny else "auto", world)
    warmup = run.shape.steps[0]
    with open_mesh(config.parallel.layout(world.size), device) as mesh:
        result = measure(config, mesh, warmup=warmup, skew=3.0, profile=True)
        if mesh.leads:
            answer.write_text(json.dumps(result))


def start(name: str, run: LayoutRun, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A layout, on processes of its own: what it found, or `failed`."""
    command = [sys.executable, __file__, "--gpus", str(arguments.gpus), "--one", name]
    command += ["--tiny"] if arguments.tiny else []
    return run_processes(command, run.gpus, arguments.logs / f"{arguments.gpus}-{name}", seconds)


def compared(runs: dict[str, LayoutRun], results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Rows of the table."""
    for name, run in runs.items():
        result = results.get(name)
        if result is None:
            continue
        if "failed" in result:
            yield (name, str(run.gpus), result["failed"])
            continue
        same = [results[n] for n, other in runs.items() if other.shape == run.shape and "losses" in results.get(n, {})]
        each, loss = result["tokens_per_second"] / run.gpus, result["losses"][-1]
        alone = same[0]["tokens_per_second"] if same[0]["gpus"] == 1 else None
        idle, peak, mfu = result["idle"], result["peak_gib"], result["mfu"]
        yield (
            name,
            str(run.gpus),
            f"{result['tokens_per_second']:,.0f}",
            f"{each:,.0f}",
            f"{each / alone:.2f}" if alone else "-",
            f"{mfu:.1%}" if mfu else "-",
            f"{peak:.1f}" if peak else "-",
            f"{sum(idle) / len(idle):.1%} ({max(idle):.1%})",
            f"{loss:.4f}",
            f"{loss - same[0]['losses'][-1]:+.1e}",
        )


def print_table(runs: dict[str, LayoutRun], results: dict[str, dict[str, Any]]) -> None:
    print("\n" + ", ".join(sorted({f"{r['device']}, torch {r['torch']}" for r in results.values() if "torch" in r})))
    heads = ("layout", "GPUs", "tokens/s", "each", "scaling", "MFU", "peak GiB", "idle", "loss", "difference")
    for row in (heads, ("---",) * len(heads), *compared(runs, results)):
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=(2, 4, 8), default=2)
    parser.add_argument("--layouts", help="names, with commas between them; default: all, see --list")
    parser.add_argument("--list", action="store_true", help="name all layouts")
    parser.add_argument("--tiny", action="store_true", help="tiny models on CPUs")
    parser.add_argument("--json", type=Path, help="append results to this file, and leave out what is in it")
    parser.add_argument("--logs", type=Path, default=Path("runs/train_parallel"), help="what processes print")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds for each layout")
    parser.add_argument("--seconds", type=float, default=570.0, help="start nothing that might end after so many")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    runs = layouts(arguments.gpus)
    if arguments.one is not None:
        try:
            one_process(runs[arguments.one], arguments.tiny, arguments.answer)
        except TreadleError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        return
    names = list(runs) if arguments.layouts is None else arguments.layouts.split(",")
    if unknown := [name for name in names if name not in runs]:
        parser.error(f"--layouts: {', '.join(unknown)}; there are {', '.join(runs)}")
    if arguments.list:
        print(*runs, sep="\n")
        return
    results = measure_all(
        *(names, lambda name, seconds: start(name, runs[name], arguments, seconds), arguments.json),
        timeout=arguments.timeout,
        seconds=arguments.seconds,
    )
    print_table(runs, results)


if __name__ == "__main__":
    main()
