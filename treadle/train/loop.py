"""The training loop: batches in, steps out. What else happens around a step is a callback's."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from treadle.data.packing import Batch
from treadle.errors import TrainingError
from treadle.parallel.gradients import gradient_norm
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import own_parameters
from treadle.parallel.watchdog import Watchdog
from treadle.train.config import TrainingConfig
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import LossFunction
from treadle.train.routing import balance
from treadle.train.schedules import ScheduleConfig
from treadle.train.state import TrainState
from treadle.train.timing import Stopwatch

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 40  # each halves the loss scale: from 65,536 it is then far below one, and not the cause


@dataclass(frozen=True)
class StepRecord:
    """What one step did. loss: nats per token, without penalties. grad_norm: global, before clipping. tokens: that
    counted. seconds: waiting for data included, callbacks not.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


class Callback:
    """Something that happens around steps. Override what is needed."""

    def start(self, loop: "Loop") -> None:
        """Before the first step."""

    def step(self, loop: "Loop", record: StepRecord) -> None:
        """After each step; `loop.state.step` counts it."""

    def stop(self, loop: "Loop") -> None:
        """After the last step, also of a run that was interrupted (`loop.interrupted`); not after an error."""

    def fail(self, loop: "Loop") -> None:
        """When a step was not finite, before the error is raised."""

    def out_of_memory(self, loop: "Loop", error: Exception) -> None:
        """When the device's memory ran out, before the error goes on."""


class Loop:
    """Runs steps until the configured number is reached or somebody asks it to stop."""

    def __init__(
        self,
        state: TrainState,
        config: TrainingConfig,
        schedule: ScheduleConfig,
        loss_function: LossFunction,
        callbacks: Sequence[Callback] = (),
        *,
        mesh: Mesh | None = None,
        rescue: Path | None = None,
        timeout: float = 1800.0,
    ):
        """rescue: folder where the batch of a non-finite step is saved, and what hangs (see `Watchdog`).
        timeout: seconds that a step or a callback may take.
        """
        self.state, self.config, self.schedule = state, config, schedule
        self.loss_function, self.callbacks, self.rescue = loss_function, list(callbacks), rescue
        self.device = state.model.device
        self.mesh = mesh or Mesh(device=self.device)
        self.watchdog = Watchdog(self.mesh, timeout, rescue) if rescue is not None else None
        self.watch = Stopwatch(self.device)
        self.interrupted = False
        self.overflows = 0  # fp16: steps skipped in a row

    def run(self, batches: Iterable[list[Batch]]) -> None:
        """Take steps from `state.step` to `config.steps`; each item of `batches` is one step's micro-batches."""
        source = iter(batches)
        for callback in self.callbacks:
            callback.start(self)
        with self._signals(), self._watched() as alive:
            while self.state.step < self.config.steps and not self._asked_to_stop():
                began = time.perf_counter()
                with self.watch("data", host=True):
                    step_batches = next(source)
                try:
                    record = self._step(step_batches)
                except torch.OutOfMemoryError as error:
                    for callback in self.callbacks:
                        callback.out_of_memory(self, error)
                    raise
                record = replace(record, seconds=time.perf_counter() - began)
                for callback in self.callbacks:
                    alive()
                    callback.step(self, record)
                alive()
            for callback in self.callbacks:
                alive()
                callback.stop(self)

    def _asked_to_stop(self) -> bool:
        """Whether any process was: all stop after the same step, or some would wait for the others for ever."""
        if self.mesh.any(self.interrupted):
            self.interrupted = True
        return self.interrupted

    @contextmanager
    def _watched(self) -> Iterator[Callable[[], None]]:
        if self.watchdog is None:
            yield lambda: None
            return
        with self.watchdog.watching():
            yield self.watchdog.alive

    def _step(self, batches: list[Batch]) -> StepRecord:
        state = self.state
        lr = state.optimizers.set_lr(self.schedule.factor(state.step, self.config.steps))
        state.model.train()
        scale = state.scaler.scale(torch.ones((), device=self.device)) if state.scaler.is_enabled() else 1.0
        options: dict[str, Any] = {"loss_scale": scale, "watch": self.watch, "mesh": self.mesh}
        result = forward_backward(state.model, batches, self.loss_function, **options)
        with self.watch("optimizer"):
            for optimizer in state.optimizers.optimizers:
                state.scaler.unscale_(optimizer)
            norm = gradient_norm(own_parameters(state.model), self.mesh)
            loss, grad_norm = torch.stack((result.loss, norm)).tolist()
            self.overflows = 0 if math.isfinite(grad_norm) else self.overflows + 1
            if not math.isfinite(loss) or self.overflows > (MAX_OVERFLOWS if state.scaler.is_enabled() else 0):
                self._fail(loss, grad_norm, batches)
            if math.isfinite(grad_norm):  # else fp16 overflowed: no optimizer steps, and the scaler goes down
                if self.config.clip_norm is not None:
                    state.optimizers.clip(self.config.clip_norm, norm)
                for optimizer in state.optimizers.optimizers:
                    state.scaler.step(optimizer)
                balance(state.model, result.loads)
            state.scaler.update()
            state.optimizers.zero_grad()
        state.step += 1
        state.tokens += result.tokens
        metrics = {name: value.item() for name, value in result.metrics.items()}
        if state.scaler.is_enabled():
            metrics["loss_scale"] = state.scaler.get_scale()
        return StepRecord(state.step, loss, grad_norm, lr, result.tokens, metrics=metrics)

    def _fail(self, loss: float, grad_norm: float, batches: list[Batch]) -> None:
        """Stop before the weights are touched, and keep the batch: it is the first thing one wants to look at."""
        for callback in self.callbacks:
            callback.fail(self)
        message = f"step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}; the weights were not changed."
        if self.rescue is not None:
            each = f"-rank-{self.mesh.rank}" if self.mesh.distributed else ""
            path = self.rescue / f"nonfinite-step-{self.state.step + 1}{each}.pt"
            batch = [{"tokens": b.tokens_BS, "targets": b.targets_BS, "samples": b.samples_B} for b in batches]
            torch.save(batch, path)
            message += f" The batch is in {path}."
        error = TrainingError(f"{message} Lower optimizer.lr, lengthen schedule.warmup, or resume from a checkpoint.")
        error.everywhere = True
        raise error

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the loop after the step under way; a second SIGINT stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: FrameType | None) -> None:
            if self.interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            logger.warning("%s: stopping after this step, saving first", signal.Signals(number).name)
            self.interrupted = True

        previous: dict[int, Any] = {n: signal.signal(n, request) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
