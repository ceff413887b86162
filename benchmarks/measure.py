"""A short run of the real training loop on made-up tokens, timed: what train_single.py and train_parallel.py share."""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treadle.attention import AttentionContext
from treadle.config.base import Config
from treadle.data.packing import Batch
from treadle.nn.flops import parameter_count, training_flops
from treadle.nn.store import build_meta
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.config import ParallelConfig, check_layout
from treadle.parallel.mesh import Mesh
from treadle.train.config import TrainingConfig
from treadle.train.hardware import device_name, peak_flops
from treadle.train.loop import Callback, Loop, StepRecord
from treadle.train.losses import training_loss
from treadle.train.optimizers import AdamWConfig
from treadle.train.schedules import ConstantConfig
from treadle.train.setup import build_model, build_state

# In the names of what sends and waits, and so computes nothing.
SENDING = ("nccl", "c10d", "gloo", "barrier", "signal", "wait_tensor")


class Benchmark(Config):
    model: TransformerConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()


class Clock(Callback):
    """Seconds of each step after the first `warmup`, and the losses of all."""

    def __init__(self, warmup: int):
        self.warmup, self.seconds, self.losses = warmup, list[float](), list[float]()

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


def random_batches(
    config: Benchmark, mesh: Mesh, steps: int, *, document: int | None = None, skew: float = 1.0
) -> Iterator[list[Batch]]:
    """This process's micro-batches of fresh random tokens, which are the same whatever the layout.

    document: rows are packed with documents of about that length. skew: above one, small ids are the more frequent, and
    that can be learnt.
    """
    training, vocabulary = config.training, config.model.vocab_size or 0
    rows, length = training.batch_size, training.sequence_length
    here, at_a_time = rows // mesh.data_size, min(training.rows, rows // mesh.data_size)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        uniform_BS = torch.rand(rows, length + 1, generator=generator, dtype=torch.float64)
        tokens_BS = (uniform_BS**skew * vocabulary).long()
        starts_BS = torch.rand(rows, length, generator=generator) < 1 / (document or length)
        batches = []
        for first in range(mesh.data_rank * here, (mesh.data_rank + 1) * here, at_a_time):
            mine = slice(first, first + at_a_time)
            context = AttentionContext.causal(at_a_time, length)
            if document:
                boundaries = 2 * at_a_time * length // document
                context = AttentionContext.packed(starts_BS[mine].cumsum(1).int(), boundaries=boundaries)
            samples_B = torch.arange(rows)[mine] + step * rows
            inputs_BS, targets_BS = tokens_BS[mine, :-1], tokens_BS[mine, 1:]
            batches.append(Batch(inputs_BS, targets_BS, context, targets_BS.numel(), samples_B * 0, samples_B))
        yield batches


def measure(
    config: Benchmark,
    mesh: Mesh,
    *,
    warmup: int,
    document: int | None = None,
    skew: float = 1.0,
    profile: bool = False,
    show: bool = False,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """What a run of `config.training.steps` steps finds; the first `warmup` of them are not timed.

    profile: trace one more step, for the share of the time in which a process computes nothing; `show` prints what it
    computes. Raises ConfigError for what does not fit together.
    """
    training, device, began = config.training, mesh.device, time.perf_counter()
    rows, length, steps = training.batch_size, training.sequence_length, training.steps - warmup
    check_layout(config.parallel, mesh.world.size, config.model, rows, length, rows=training.rows)
    built = build_model(config.model, training, seed=0, mesh=mesh, parallel=config.parallel)
    state = build_state(built, AdamWConfig(lr=2e-5), training)
    clock = Clock(warmup)
    loss = training_loss(training)
    loop = Loop(state, training, ConstantConfig(warmup=warmup), loss, [clock, *callbacks], mesh=mesh)
    loop.run(list(random_batches(config, mesh, training.steps, document=document, skew=skew)))
    phases, seconds, losses = loop.watch.read(), statistics.median(clock.seconds), clock.losses.copy()
    spread = (max(clock.seconds) - min(clock.seconds)) / seconds
    cuda = device.type == "cuda"
    peaks, outside = ([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]), 0
    if cuda:
        free, whole_device = torch.cuda.mem_get_info()
        outside = whole_device - free - torch.cuda.memory_reserved()
    idle = 0.0
    if profile:
        events = trace(loop, list(random_batches(config, mesh, 1, document=document, skew=skew)))
        idle = idle_share(events)
        if show:
            print_kernels(events)
    idles, allocated, reserved, beside = (everywhere(mesh, value) for value in (idle, *peaks, outside))
    whole = build_meta(config.model)
    flops, peak = training_flops(whole, document or length) * rows * length, peak_flops(device)
    return {
        "batch": rows,
        "document": document,
        "length": length,
        "parameters": parameter_count(whole),
        "gpus": mesh.world.size,
        "tokens_per_second": rows * length / seconds,
        "spread": spread,
        "peak_gib": max(allocated) / 2**30 if cuda else None,
        "peaks_gib": [peak / 2**30 for peak in allocated] if cuda else None,
        "reserved_gib": max(reserved) / 2**30 if cuda else None,
        "outside_gib": max(beside) / 2**30 if cuda else None,
        "mfu": flops / seconds / peak / mesh.world.size if peak else None,
        "idle": idles if profile else None,
        "phases_ms": {name: 1e3 * spent / steps for name, spent in phases.items()},
        "losses": losses,
        "total_seconds": time.perf_counter() - began,
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def everywhere(mesh: Mesh, value: float) -> list[float]:
    """A number of each process, by rank."""
    found = torch.zeros(mesh.world.size, dtype=torch.float64)
    found[mesh.rank] = value
    if mesh.distributed:
        dist.all_reduce(found)
    return found.tolist()


def trace(loop: Loop, batches: list[list[Batch]]) -> list[dict[str, Any]]:
    """What computes or sends in further steps: kernels on a GPU, PyTorch's operations on a CPU. ts and dur in us."""
    cuda = loop.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    loop.config = loop.config.model_copy(update={"steps": loop.state.step + len(batches)})
    with torch.profiler.profile(activities=[activity]) as profiler:
        loop.run(batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") == ("kernel" if cuda else "cpu_op")]


def idle_share(events: list[dict[str, Any]]) -> float:
    """The share of the time, from the first event to the last, in which nothing is computed: what is sent and waited
    for is no computation. NaN without events.
    """
    if not events:
        return float("nan")
    found = sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in events)
    begin, end = found[0][0], max(stop for _, stop, _ in found)
    busy, until = 0.0, begin
    for start, stop, name in found:
        if not any(word in name for word in SENDING):
            busy += max(0.0, stop - max(start, until))
            until = max(until, stop)
    return 1 - busy / (end - begin)


def print_kernels(events: list[dict[str, Any]]) -> None:
    """Those that take the most time."""
    spent: dict[str, list[float]] = {}
    for event in events:
        spent.setdefault(event["name"], []).append(event["dur"] / 1e3)
    print(f"{sum(map(sum, spent.values())):.1f} ms")
    for name, each in sorted(spent.items(), key=lambda item: -sum(item[1]))[:30]:
        print(f"{sum(each):8.2f} ms {len(each):5d} x  {name[:110]}")
