"""Planned against what others have published of their frameworks: speed in closed form, without a GPU.

    python benchmarks/plan.py

No constant was fitted to it: a plan assumes this package's way of training, and theirs differ. What this package was
measured at is in plan_accuracy.py.
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
    others = Table("who", "model", "GPUs", "tokens/s of a GPU", "planned", "ratio", "GiB planned")
    for who, model, device, gpus, rows, training, parallel, speed in PUBLISHED:
        plan = planned(model, device, gpus, {"batch_size": rows, "sequence_length": 8192, **training}, parallel)
        rate = plan.tokens_per_second / gpus
        cells = (f"{speed:,.0f}", f"{rate:,.0f}", f"{rate / speed:.2f}", f"{plan.peak / GIB:.1f}")
        others.add_row(who, model, str(gpus), *cells)
    Console(width=140).print(others)


if __name__ == "__main__":
    main()
