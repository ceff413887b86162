"""Planned against measured and published: memory and speed, in closed form, without a GPU.

    python benchmarks/plan.py

The first table is this package's own measurements (docs/benchmarks.md). The second is what others have published of
their frameworks, to which no constant was fitted: a plan assumes this package's way of training, and theirs differ.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from treadle.config import read_yaml, resolve
from treadle.memory.devices import DEVICES
from treadle.memory.plan import GIB, Plan
from treadle.memory.predict import Planned, predict

MODELS = Path(__file__).parent.parent / "recipes/models"

# model, rows, length, training, GiB at the peak (max_memory_allocated), tokens/s; one H200
MEASURED: list[tuple[str, int, int, dict[str, Any], float, float]] = [
    ("llama-1.5b", 4, 8192, {}, 63.0, 56_600),
    ("llama-1.5b", 2, 8192, {}, 43.2, 52_860),
    ("llama-1.5b", 2, 8192, {"compile": False}, 47.2, 47_304),
    ("moe-2b", 8, 4096, {}, 67.3, 122_400),
    ("dense-0.4b", 8, 4096, {}, 33.0, 162_000),
]

# H100s of 500 W with 2.4 TB/s of memory, as torchtitan's machines have
H100_500W = DEVICES["h100"].model_copy(update={"memory_gib": 94.0, "bandwidth_tbs": 2.14})
SELECTIVE: dict[str, Any] = {"activation_checkpointing": "selective", "micro_batch_size": 2}

# source, model, device, GPUs, rows, training, parallel, tokens/s of a GPU
PUBLISHED: list[tuple[str, str, Any, int, int, dict[str, Any], dict[str, Any], float]] = [
    ("torchtitan, eager", "llama-3.1-8b", H100_500W, 8, 16, {**SELECTIVE, "compile": False}, {}, 5_762),
    ("torchtitan", "llama-3.1-8b", H100_500W, 8, 16, SELECTIVE, {}, 6_667),
    ("torchtitan, eager", "llama-3.1-8b", H100_500W, 128, 256, {**SELECTIVE, "compile": False}, {}, 5_605),
    ("torchtitan", "llama-3.1-8b", H100_500W, 128, 256, SELECTIVE, {}, 6_514),
    # Llama 3 (arXiv:2407.21783), table 4: 430 and 400 TFLOP/s of a GPU
    *(
        ("Llama 3 paper", "llama-3.1-405b", DEVICES["h100"], gpus, 2048, {"micro_batch_size": 1}, layout, rate)
        for gpus, layout, rate in (
            (8192, {"tensor": 8, "pipeline": 16, "schedule": "interleaved_1f1b"}, 430e12 / 2.53e12),
            (16384, {"tensor": 8, "pipeline": 16, "schedule": "interleaved_1f1b"}, 400e12 / 2.53e12),
        )
    ),
]


def planned(model: str, device: Any, gpus: int, training: dict[str, Any], parallel: dict[str, Any]) -> Plan:
    source = {"model": read_yaml(MODELS / f"{model}.yaml"), "training": {"steps": 1, **training}, "parallel": parallel}
    return predict(resolve(Planned, source), gpus, device)


def main() -> None:
    own = Table("model", "rows", "", "GiB", "planned", "ratio", "tokens/s", "planned", "ratio")
    for model, rows, length, training, memory, speed in MEASURED:
        plan = planned(model, DEVICES["h200"], 1, {"batch_size": rows, "sequence_length": length, **training}, {})
        found, rate = plan.allocated / GIB, plan.tokens_per_second
        how = "compiled" if training.get("compile", True) else "eager"
        cells = (f"{found:.1f}", f"{found / memory:.3f}", f"{speed:,}", f"{rate:,.0f}", f"{rate / speed:.3f}")
        own.add_row(model, str(rows), how, str(memory), *cells)
    others = Table("who", "model", "GPUs", "tokens/s of a GPU", "planned", "ratio", "GiB planned")
    for who, model, device, gpus, rows, training, parallel, speed in PUBLISHED:
        plan = planned(model, device, gpus, {"batch_size": rows, "sequence_length": 8192, **training}, parallel)
        rate = plan.tokens_per_second / gpus
        cells = (f"{speed:,.0f}", f"{rate:,.0f}", f"{rate / speed:.2f}", f"{plan.peak / GIB:.1f}")
        others.add_row(who, model, str(gpus), *cells)
    console = Console(width=140)
    console.print(own)
    console.print(others)


if __name__ == "__main__":
    main()
