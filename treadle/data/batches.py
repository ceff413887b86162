"""Batches by step number: `batch(step)` depends on the step alone, so a run resumes anywhere, on any ranks."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from treadle.data.packing import Batch
from treadle.data.prefetch import Prefetch
from treadle.errors import ConfigError, DataError


class Batches(ABC):
    """Training batches, cut from one endless sequence of samples that are numbered from 0.

    batch_size: rows of a global batch; each of `world` ranks gets a contiguous part of them. Raises ConfigError for a
    batch size that the ranks do not divide.
    """

    def __init__(self, batch_size: int, rank: int = 0, world: int = 1):
        check_division(batch_size, world)
        self.batch_size, self.rank, self.world = batch_size, rank, world

    @abstractmethod
    def samples(self, start: int, stop: int) -> Batch:
        """Global samples [start, stop) as one batch."""

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to go on where it stopped, by name."""

    def batch(self, step: int) -> Batch:
        """This rank's rows of global batch `step`."""
        return self.samples(*self._range(step))

    def micro_batches(self, step: int, rows: int) -> list[Batch]:
        """The same rows as `batch(step)`, in batches of `rows` rows (the last may be smaller)."""
        start, stop = self._range(step)
        return [self.samples(first, min(first + rows, stop)) for first in range(start, stop, rows)]

    def iterate(self, start: int = 0, stop: int | None = None, *, depth: int = 2) -> Prefetch[Batch]:
        """Batches from step `start` on, made ahead by a thread, in pinned memory where there is a GPU."""
        return Prefetch(_pinned(self.batch), start, stop, depth=depth)

    def iterate_micro(
        self, rows: int, start: int = 0, stop: int | None = None, *, depth: int = 2
    ) -> Prefetch[list[Batch]]:
        """`micro_batches` of each step from `start` on, made ahead by a thread, pinned where there is a GPU."""
        return Prefetch(_pinned(partial(self.micro_batches, rows=rows)), start, stop, depth=depth)

    def state(self, step: int) -> dict[str, Any]:
        """All that is needed to go on with global batch `step`: a few integers and strings, for JSON."""
        return {"samples": step * self.batch_size, "batch_size": self.batch_size, "fingerprint": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """The step to go on with. Ranks and micro-batches may differ; raises DataError if the data or its order do."""
        for key, now in self.fingerprint.items():
            then = state["fingerprint"].get(key)
            if then != now:
                raise DataError(
                    f"data.{key}: the run was stopped with {shown(then)} and is resumed with {shown(now)}, which would "
                    f"change its samples; restore the data and settings of that run, or start a new run"
                )
        step, left = divmod(state["samples"], self.batch_size)
        if left:
            raise DataError(
                f"the run has used {state['samples']} samples in batches of {state['batch_size']}; a batch size of "
                f"{self.batch_size} cannot go on from there; choose one that divides {state['samples']}"
            )
        return int(step)

    def _range(self, step: int) -> tuple[int, int]:
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        return start, start + share


def _pinned(make: Callable[[int], Any]) -> Callable[[int], Any]:
    if not torch.cuda.is_available():
        return make

    def pinned(step: int) -> Any:
        made = make(step)
        return [batch.pin_memory() for batch in made] if isinstance(made, list) else made.pin_memory()

    return pinned


def check_division(batch_size: int, world: int) -> None:
    if batch_size <= 0 or batch_size % world:
        raise ConfigError(f"batch_size: {batch_size} rows cannot be shared out equally to {world} ranks")


def shown(value: Any) -> str:
    """Short enough for a message, yet different for different values."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
