"""Work ahead of a consumer: a thread makes the next items while the current one is in use."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates make(start), make(start + 1), ... up to `stop`; `depth` wait, made, while the thread is at the next.

    An error in `make` is raised in the consumer, at the item it belongs to. `close()`, or leaving the `with` block,
    stops the thread; so does the program's end.
    """

    def __init__(self, make: Callable[[int], T], start: int = 0, stop: int | None = None, *, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth {depth}; expected at least 1")
        self._make, self._steps = make, count(start) if stop is None else iter(range(start, stop))
        self._pool = ThreadPoolExecutor(1, "treadle-prefetch")
        self._ahead: deque[Future[T]] = deque()
        for _ in range(depth + 1):
            self._begin_next()

    def _begin_next(self) -> None:
        for step in self._steps:
            # The pool must not hold `self`, or a forgotten iterator would never be collected and never stop.
            self._ahead.append(self._pool.submit(self._make, step))
            return

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._ahead:
            self.close()
            raise StopIteration
        self._begin_next()
        try:
            return self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the thread, and wait for the item it is at."""
        self._steps = iter(())
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
