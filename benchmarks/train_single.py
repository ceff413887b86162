"""Training speed on one GPU: the real loop on random tokens of a Llama-shaped model of 1.5 B parameters (T1).

    python benchmarks/train_single.py --batch 4 --steps 30 [key=value ...]

Prints one table: batch, tokens/s (median and spread over steps), peak memory, MFU, where the time goes.
Overrides change the `training` section (training.compile=false) or the model (model.layers.0.repeat=2).
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from treadle.attention import AttentionContext
from treadle.config import resolve
from treadle.config.base import Config
from treadle.data.packing import Batch
from treadle.nn.flops import parameter_count, training_flops
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.mesh import Mesh, find_device
from treadle.train.config import TrainingConfig
from treadle.train.hardware import device_name, peak_flops
from treadle.train.loop import Callback, Loop, StepRecord
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig
from treadle.train.schedules import ConstantConfig
from treadle.train.setup import build_model, build_state


class Benchmark(Config):
    model: TransformerConfig
    training: TrainingConfig


class Clock(Callback):
    def __init__(self, warmup: int):
        self.warmup, self.seconds, self.losses = warmup, [], []

    def step(self, loop: Loop, record: StepRecord) -> None:
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if record.step == self.warmup:
            loop.watch.read()
        if record.step > self.warmup:
            self.seconds.append(now - self.last)
        self.last = now
        self.losses.append(record.loss)


def random_batches(rows: int, length: int, vocabulary: int, steps: int, *, document: int | None) -> list[list[Batch]]:
    """Fresh random tokens for every step; with `document`, rows are packed with documents of about that length."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in range(steps):
        tokens_BS = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
        context = AttentionContext.causal(rows, length)
        if document:
            starts_BS = torch.rand(rows, length, generator=generator) < 1 / document
            context = AttentionContext.packed(starts_BS.cumsum(1).int(), boundaries=2 * rows * length // document)
        samples_B = torch.arange(rows) + step * rows
        batches.append([Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], context, rows * length, samples_B * 0, samples_B)])
    return batches


def measure(
    model: dict, training: dict, overrides: list[str], steps: int, warmup: int, document: int | None, profile: bool
) -> dict:
    source = {"model": model, "training": {**training, "steps": steps + warmup}}
    config = resolve(Benchmark, source, overrides)
    device = find_device("auto")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    built = build_model(config.model, config.training, seed=0, mesh=Mesh(device=device))
    state = build_state(built, AdamWConfig(lr=1e-4), config.training)
    clock = Clock(warmup)
    rows, length = config.training.batch_size, config.training.sequence_length
    batches = random_batches(rows, length, config.model.vocab_size, steps + warmup, document=document)
    start = time.perf_counter()
    loss = partial(cross_entropy, attention=config.training.attention)
    loop = Loop(state, config.training, ConstantConfig(warmup=warmup), loss, [clock], mesh=Mesh(device=device))
    loop.run(batches)
    phases = loop.watch.read()
    if profile:
        print_profile(loop, batches[:2])
    step_seconds = statistics.median(clock.seconds)
    flops = training_flops(built, document or length) * rows * length
    peak = peak_flops(device)
    return {
        "batch": rows,
        "document": document,
        "parameters": parameter_count(built),
        "tokens_per_second": rows * length / step_seconds,
        "spread": (max(clock.seconds) - min(clock.seconds)) / step_seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
        "mfu": flops / step_seconds / peak if peak else None,
        "phases_ms": {name: 1e3 * seconds / steps for name, seconds in phases.items()},
        "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
        "total_seconds": time.perf_counter() - start,
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_profile(loop: Loop, batches: list[list[Batch]]) -> None:
    """The kernels of two more steps, by total time."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    loop.config = loop.config.model_copy(update={"steps": loop.state.step + len(batches)})
    with torch.profiler.profile(activities=activities) as profiler:
        loop.run(batches)
    kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    print(f"device busy {total / 1e3 / len(batches):.1f} ms a step")
    for event in kernels[:30]:
        ms = event.self_device_time_total / 1e3 / len(batches)
        print(f"{ms:8.2f} ms {event.count // len(batches):5d} x  {event.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "recipes/models/llama-1.5b.yaml")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--document", type=int, help="pack rows with documents of about this length")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the most time")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    training = {"batch_size": arguments.batch, "sequence_length": arguments.length}
    from treadle.config import read_yaml

    model = read_yaml(arguments.model)
    a = arguments
    r = measure(model, training, a.overrides, a.steps, a.warmup, a.document, a.profile)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(r) + "\n")
    memory = f"{r['peak_gib']:.1f} GiB (reserved {r['reserved_gib']:.1f})" if r["peak_gib"] else "-"
    mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
    phases = ", ".join(f"{name} {ms:.1f}" for name, ms in r["phases_ms"].items())
    print(
        f"| {r['device']} | torch {r['torch']} | batch {r['batch']} | document {r['document']} | "
        f"{r['tokens_per_second']:,.0f} tokens/s | spread {r['spread']:.1%} | {memory} | MFU {mfu} | ms: {phases} | "
        f"loss {r['first_loss']:.3f} -> {r['last_loss']:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
