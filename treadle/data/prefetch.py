"""Work ahead of a consumer: a thread makes the next items while the current one is in use."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates make(start), make(start + 1), ... up to `stop`, at most `depth` made ahead.

    An error in `make` is raised in the consumer, at the item it belongs to. `close()`, or leaving the `with` block,
    stops the thread; so does the program's end.
    """

    def __init__(self, make: Callable[[int], T], start: int = 0, stop: int | None = None, *, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth {depth}; expected at least 1")
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopping = threading.Event()
        self._over = False
        # The thread must not hold `self`, or a forgotten iterator would never be collected and never stop.
        arguments = (make, start, stop, self._queue, self._stopping)
        self._thread = threading.Thread(target=_work, args=arguments, name="treadle-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._over = True
            self.close()
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread, and wait for the item it is at."""
        self._over = True
        self._stopping.set()
        self._thread.join()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stopping.set()


def _work(
    make: Callable[[int], T],
    step: int,
    stop: int | None,
    out: "queue.Queue[tuple[T | None, BaseException | None]]",
    stopping: threading.Event,
) -> None:
    item: tuple[T | None, BaseException | None]
    while not stopping.is_set():
        try:
            item = (make(step), None) if stop is None or step < stop else (None, StopIteration())
        except BaseException as error:  # whatever it is, it belongs to the consumer
            item = (None, error)
        while not stopping.is_set():
            try:
                out.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if item[1] is not None:
            return
        step += 1
