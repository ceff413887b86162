"""An engine in a process of its own, for a server whose event loop must never wait for a step.

The two exchange messages over a pipe: requests and aborts one way, new tokens of a step the other way.
"""

import asyncio
import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from treadle.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.inference.request import FinishReason, Logprob, Request, Sampling, Status
from treadle.inference.states import POOLED


class EngineDied(TreadleError):
    """The engine's process is gone; what it was doing is lost."""


@dataclass(frozen=True)
class Update:
    """What is new of a request. prompt_logprobs come with the first update, finish and pooled with the last."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached: int = 0
    pooled: np.ndarray | None = None  # not a tensor, of which each would travel as an open file


@dataclass(frozen=True)
class Load:
    """How busy an engine is: requests that run and wait, preemptions so far, the share of cache that is held.

    proposed, accepted: tokens that were guessed so far, and those that were right.
    """

    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    cache: float = 0.0
    proposed: int = 0
    accepted: int = 0


class EngineProcess:
    """Starts the engine, and tells requests' tokens to whoever waits for them."""

    def __init__(self, make: Callable[[], Engine]):
        """make: builds the engine, there; it has to be picklable."""
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, make), daemon=True, name="treadle-engine")
        self._process.start()
        there.close()
        self._queues: dict[int, asyncio.Queue[Update | Exception]] = {}
        self._numbers = iter(range(1 << 62))
        self._outbox = queue.SimpleQueue[Any]()  # a full pipe blocks its own thread, not the event loop
        self.load, self.error = Load(), ""

    async def start(self) -> int:
        """Wait until the engine is there.  -> its `max_length`. Raises what its construction raised, or EngineDied."""
        self._loop = asyncio.get_running_loop()
        try:
            ready = await asyncio.to_thread(self._connection.recv)
        except EOFError:
            raise EngineDied("the engine's process ended before it was ready; its own error is above") from None
        if isinstance(ready, Exception):
            raise ready
        for loop in (self._listen, self._send):
            threading.Thread(target=loop, daemon=True).start()
        return int(ready)

    @property
    def alive(self) -> bool:
        return not self.error and self._process.is_alive()

    @property
    def requests(self) -> int:
        """Those that somebody waits for."""
        return len(self._queues)

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Update, None]:
        """Updates until the request ends. Whoever stops listening aborts it. Raises what `Engine.add` raises."""
        if self.error:
            raise EngineDied(self.error)
        number, news = next(self._numbers), asyncio.Queue[Update | Exception]()
        self._queues[number] = news
        try:
            self._outbox.put(("add", number, prompt, sampling))
            while True:
                update = await news.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.finish is not None:
                    return
        finally:
            del self._queues[number]
            self._outbox.put(("abort", number))  # of no effect on one that has ended

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join(10)

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the process is gone, which `_listen` says
            while True:
                self._connection.send(self._outbox.get())

    def _listen(self) -> None:
        while True:
            try:
                load, updates = self._connection.recv()
            except Exception:  # the end of the pipe, or what came cannot be read: nobody may wait for ever
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._died)
                return
            self._loop.call_soon_threadsafe(self._deliver, load, updates)

    def _deliver(self, load: Load, updates: dict[int, Update | Exception]) -> None:
        self.load = load
        for number, update in updates.items():
            if number in self._queues:
                self._queues[number].put_nowait(update)

    def _died(self) -> None:
        self._process.join(5)
        self.error = f"the engine's process ended with code {self._process.exitcode}; its own error is in the log"
        for news in self._queues.values():
            news.put_nowait(EngineDied(self.error))


def _work(connection: Connection, make: Callable[[], Engine]) -> None:
    """The engine's process: ends when the other end of the pipe does."""
    for each in (signal.SIGINT, signal.SIGTERM):  # which may be sent to all processes; the server decides
        signal.signal(each, signal.SIG_IGN)
    try:
        engine = make()
    except TreadleError as error:
        connection.send(error)
        return
    connection.send(engine.max_length)
    running: dict[int, Request] = {}
    told: dict[int, int] = {}
    load = Load()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            updates: dict[int, Update | Exception] = {}
            while connection.poll(0 if engine.busy or updates else None):
                kind, number, *rest = connection.recv()
                if kind == "abort" and number in running:
                    engine.abort(running.pop(number))
                    told.pop(number)
                elif kind == "add":
                    try:
                        running[number], told[number] = engine.add(*rest), 0
                    except TreadleError as error:
                        updates[number] = error
            engine.step()
            for number, request in list(running.items()):
                if len(request.outputs) > told[number] or request.status is Status.FINISHED:
                    updates[number] = _update(request, told[number])
                    told[number] = len(request.outputs)
                if request.status is Status.FINISHED:
                    del running[number], told[number]
            before, load = load, _load(engine)
            if updates or load != before:
                connection.send((load, updates))


def _update(request: Request, told: int) -> Update:
    first, pooled = told == 0, request.hidden.get(POOLED)
    return Update(
        request.outputs[told:],
        request.logprobs[told:],
        request.prompt_logprobs if first else [],
        request.finish,
        request.cached,
        None if pooled is None else pooled.numpy(),
    )


def _load(engine: Engine) -> Load:
    scheduler, guesses = engine.scheduler, engine.speculation
    counts = (0, 0) if guesses is None else (guesses.proposed, guesses.accepted)
    return Load(len(scheduler.running), len(scheduler.waiting), scheduler.preemptions, 1 - engine.tables.free, *counts)
