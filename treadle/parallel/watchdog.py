"""When nothing moves any more: every process writes what it is doing, and the run ends instead of waiting for ever."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treadle.parallel.mesh import Mesh

GRACE = 5.0  # seconds between writing and ending: the first process to end takes the others with it
EXIT_CODE = 75


class Watchdog:
    """Between `start` and `close`, `alive` must be called at least every `seconds`. Idle where there is one process.

    faulthandler writes from a thread of its own in C, also when the interpreter's lock is held; ending is a Python
    thread's work.
    """

    def __init__(self, mesh: Mesh, seconds: float, folder: Path):
        self.seconds = seconds
        self.path = folder / f"stacks-rank-{mesh.rank:05d}.txt"
        self._enabled = mesh.distributed
        self._last = time.monotonic()
        self._ended = threading.Event()

    def alive(self) -> None:
        """Progress: the time begins anew."""
        self._last = time.monotonic()
        if self._enabled:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self._enabled:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w") as self._file:
            self.alive()
            threading.Thread(target=self._watch, daemon=True).start()
            try:
                yield
            finally:
                self._ended.set()
                faulthandler.cancel_dump_traceback_later()
        if self.path.stat().st_size == 0:
            self.path.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() > self._last + self.seconds + GRACE:
                print(
                    f"error: nothing moved for {self.seconds:g} s (parallel.timeout); what each process was doing is "
                    f"in {self.path.parent}/stacks-rank-*.txt",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_CODE)
