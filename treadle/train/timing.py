"""Where a step's time goes, without making the device wait."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums the seconds spent under named phases: host time on a CPU, device events on a GPU (read when asked for)."""

    def __init__(self, device: str | torch.device):
        self.cuda = torch.device(device).type == "cuda"
        self._host: dict[str, float] = defaultdict(float)
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    @contextmanager
    def __call__(self, phase: str, *, host: bool = False) -> Iterator[None]:
        """Time a phase. `host=True` for work that is the host's alone, such as waiting for data."""
        if self.cuda and not host:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events[phase].append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._host[phase] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last read; waits for the device."""
        seconds = dict(self._host)
        for phase, pairs in self._events.items():
            pairs[-1][1].synchronize()
            seconds[phase] = sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
        self._host.clear()
        self._events.clear()
        return seconds
