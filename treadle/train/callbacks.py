"""What happens around the steps of a training run: metrics, progress, checkpoints, evaluation, samples."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from treadle.nn.flops import training_flops
from treadle.nn.store import build_meta
from treadle.parallel.data import release
from treadle.tracking.run import Run
from treadle.train.checkpoint import Checkpointer
from treadle.train.hardware import device_name, peak_flops
from treadle.train.loop import Callback, Loop, StepRecord

logger = logging.getLogger(__name__)


class Metrics(Callback):
    """Logs the mean over each window of steps to the run, with speed, MFU, memory and where the time went.

    tokens_per_second counts all positions that were computed, by the clock on the wall; `tokens` only those with a
    target. Time spent in callbacks (evaluation, samples, checkpoints) is left out of the speed.
    """

    def __init__(self, run: Run, every: int, positions_per_step: int, length: float):
        """positions_per_step: rows x sequence length. length: of a token's document, for attention FLOPs."""
        self.run, self.every, self.positions, self.length = run, every, positions_per_step, length
        self.window: list[StepRecord] = []
        self.latest: dict[str, float] = {}

    def start(self, loop: Loop) -> None:
        whole = build_meta(loop.state.model.config)  # here there may be a stage of it only
        self.flops_per_step = training_flops(whole, self.length) * self.positions
        peak = peak_flops(loop.device)
        self.peak = None if peak is None else peak * loop.mesh.world.size
        if self.peak is None:
            logger.info("MFU is not reported: the peak of '%s' is not known", device_name(loop.device))
        else:
            logger.info("MFU counts causal attention FLOPs, peak %.1f TFLOP/s dense bf16", self.peak / 1e12)

    def step(self, loop: Loop, record: StepRecord) -> None:
        self.window.append(record)
        loop.state.flops += self.flops_per_step
        if record.step % self.every == 0 or record.step == loop.config.steps:
            self._log(loop)

    def stop(self, loop: Loop) -> None:
        if self.window:
            self._log(loop)

    fail = stop

    def _log(self, loop: Loop) -> None:
        phases = loop.watch.read()
        n, tokens = len(self.window), sum(r.tokens for r in self.window)
        seconds = sum(r.seconds for r in self.window)
        norms = [r.grad_norm for r in self.window if math.isfinite(r.grad_norm)]  # fp16 overflows are not
        metrics: dict[str, float] = {
            # A token is the unit of the loss, so steps weigh by their tokens.
            "loss": sum(r.loss * r.tokens for r in self.window) / tokens,
            "grad_norm": sum(norms) / len(norms) if norms else math.inf,
            "lr": self.window[-1].lr,
            "tokens": loop.state.tokens,
            "flops": loop.state.flops,
            "tokens_per_second": n * self.positions / seconds,
            **{f"{phase}_seconds": total / n for phase, total in phases.items()},
        }
        for name in self.window[-1].metrics:
            metrics[name] = sum(r.metrics[name] * r.tokens for r in self.window) / tokens
        if self.peak is not None:
            metrics["mfu"] = n * self.flops_per_step / seconds / self.peak
        if loop.device.type == "cuda":
            held = (torch.cuda.max_memory_allocated(loop.device), torch.cuda.max_memory_reserved(loop.device))
            allocated, reserved = loop.mesh.maximum(held)
            metrics |= {"memory_gib": allocated / 2**30, "memory_reserved_gib": reserved / 2**30}
        self.run.log(loop.state.step, metrics)
        self.latest = metrics
        self.window.clear()


class ShowProgress(Callback):
    """A live bar on a terminal, a line a window elsewhere."""

    def __init__(self, console: Console, metrics: Metrics):
        self.console, self.metrics = console, metrics
        self.bar: Progress | None = None

    def start(self, loop: Loop) -> None:
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=loop.config.steps, completed=loop.state.step, shown="")
            self.bar.start()

    def step(self, loop: Loop, record: StepRecord) -> None:
        shown = f"loss {record.loss:.3f}  lr {record.lr:.1e}"
        if self.metrics.latest:
            shown += f"  {self.metrics.latest['tokens_per_second']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=record.step, shown=shown)
        elif record.step % self.metrics.every == 0:
            self.console.print(f"step {record.step:>6}/{loop.config.steps}  {shown}", highlight=False)

    def stop(self, loop: Loop) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal; also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class SaveCheckpoints(Callback):
    """Saves every so many steps, and at the end of the run or its interruption."""

    def __init__(self, checkpointer: Checkpointer, facts: Callable[[int], dict[str, Any]]):
        """facts: what to save beside the tensors at a step."""
        self.checkpointer, self.facts = checkpointer, facts

    def step(self, loop: Loop, record: StepRecord) -> None:
        self.checkpointer.poll()
        every = self.checkpointer.config.every
        # The last step too, before its evaluation and sample have a chance to fail.
        if record.step == loop.config.steps or (every is not None and record.step % every == 0):
            self.checkpointer.save(loop.state, self.facts(record.step))

    def stop(self, loop: Loop) -> None:
        if loop.state.step:  # before the first step there is nothing that the seed does not give
            self.checkpointer.save(loop.state, self.facts(loop.state.step), wait=True)


class Every(Callback):
    """Calls a function of the step every so many steps, and after the last one unless interrupted."""

    def __init__(self, every: int | None, function: Callable[[int], None]):
        self.every, self.function = every, function

    def step(self, loop: Loop, record: StepRecord) -> None:
        last = record.step == loop.config.steps
        if last or (self.every is not None and record.step % self.every == 0):
            self.function(record.step)
            release(loop.state.model)
