"""The answer to one HTTP request: the engine's updates of all its choices, whole or as server-sent events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import Tensor

from treadle.data.chat import ChatTemplate
from treadle.data.tokenizer import Tokenizer
from treadle.errors import TreadleError
from treadle.inference.process import EngineDied, EngineProcess, Load
from treadle.inference.protocol import (
    Body,
    CompletionBody,
    DrawnBody,
    Offsets,
    chat_logprobs,
    completion_logprobs,
)
from treadle.inference.request import Logprob, Pooling, Sampling
from treadle.inference.text_stream import TextStream


@dataclass
class Serving:
    """What the server serves, and within which limits.

    waiting: requests that may wait for the engine or run in it; more are told to come back (429). max_length: tokens of
    a request, prompt and answer. pooling: how a text becomes a vector; None: the server has no embeddings.
    """

    name: str
    engine: EngineProcess
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    max_length: int
    key: str | None = None
    waiting: int = 4096
    pooling: Pooling | None = None
    draining: bool = False


@dataclass
class Choice:
    """One answer as it comes."""

    stream: TextStream | None
    offsets: Offsets
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: str | None = None
    cached: int = 0
    pooled: Tensor | None = None
    begun: bool = False

    @property
    def text(self) -> str:
        return "" if self.stream is None else self.stream.text


class Refused(TreadleError):
    """Not now, or not you: an HTTP status beside the message."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.code = status, code


class Meters:
    """What Prometheus reads."""

    def __init__(self, serving: Serving):
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("treadle_requests", "Requests by how they ended", ["outcome"], **named)
        self.prompt = Counter("treadle_prompt_tokens", "Tokens of prompts", **named)
        self.cached = Counter("treadle_cached_tokens", "Tokens of prompts that were computed before", **named)
        self.output = Counter("treadle_output_tokens", "Tokens generated", **named)
        times = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.first = Histogram("treadle_first_token_seconds", "Time to the first token", buckets=times, **named)
        self.whole = Histogram("treadle_request_seconds", "Time of a request", buckets=(*times, 120, 300), **named)
        for name in (each.name for each in fields(Load)):
            gauge = Gauge(f"treadle_engine_{name}", f"The engine's load: {name}", **named)
            gauge.set_function(lambda name=name: getattr(serving.engine.load, name))  # type: ignore[misc]


Wanted = Sequence[tuple[list[int], Sampling]]


class Answer:
    """The answer to one HTTP request, of any number of choices."""

    def __init__(self, serving: Serving, meters: Meters, prefix: str, kind: str, body: Body):
        self.serving, self.meters, self.body, self.kind = serving, meters, body, kind
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": serving.name}

    async def whole(self, request: Request, wanted: Wanted) -> list[Choice]:
        """All choices to their ends. Raises Refused when the client has gone."""
        self._admit(wanted)
        choices = [self._choice() for _ in wanted]

        async def fill(choice: Choice, prompt: list[int], sampling: Sampling) -> None:
            async for _ in self._pieces(choice, prompt, sampling):
                pass

        work: Any = asyncio.gather(*(fill(choice, *each) for choice, each in zip(choices, wanted, strict=True)))
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Refused(499, "the client has gone", "disconnected")
            await work
        finally:
            work.cancel()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, TreadleError):
                await work
        return choices

    async def streamed(self, request: Request, wanted: Wanted, entry: Callable[..., dict[str, Any]]) -> Response:
        """Server-sent events of all choices, as they come. What is wrong with a request is said before any of them."""
        self._admit(wanted)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        choices = [self._choice() for _ in wanted]

        async def fill(index: int, prompt: list[int], sampling: Sampling) -> None:
            try:
                async for piece, known in self._pieces(choices[index], prompt, sampling):
                    queue.put_nowait((index, piece, known))
            except TreadleError as error:
                queue.put_nowait(error)
            queue.put_nowait(None)

        tasks = [asyncio.create_task(fill(index, *each)) for index, each in enumerate(wanted)]
        waits, gone = asyncio.ensure_future(queue.get()), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait([waits, gone], return_when=asyncio.FIRST_COMPLETED)
            first = waits.result() if waits.done() else Refused(499, "the client has gone", "disconnected")
        except BaseException:
            for task in (*tasks, waits):
                task.cancel()
            raise
        finally:
            gone.cancel()
        if isinstance(first, Exception):
            for task in (*tasks, waits):
                task.cancel()
            raise first

        async def events() -> AsyncIterator[str]:
            open_choices, item, kind = len(tasks), first, self.kind.replace("completion", "completion.chunk")
            kind = kind if self.kind.startswith("chat") else self.kind
            try:
                while True:
                    if item is None:
                        open_choices -= 1
                    elif isinstance(item, Exception):
                        yield _event({"error": {"message": str(item), "type": "server_error"}})
                        return
                    else:
                        index, piece, known = item
                        made = entry(index, choices[index], piece, known)
                        yield _event({**self.head, "object": kind, "choices": [made]})
                    if not open_choices:
                        break
                    item = await queue.get()
                if isinstance(self.body, DrawnBody) and self.body.usage_wanted:
                    yield _event({**self.head, "object": kind, "choices": [], "usage": usage_of(wanted, choices)})
                yield "data: [DONE]\n\n"
            finally:  # also when the client goes away: what still runs is aborted
                for task in tasks:
                    task.cancel()

        return StreamingResponse(events(), media_type="text/event-stream")

    def message(self, entries: list[dict[str, Any]], wanted: Wanted, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self.head, "object": self.kind, "choices": entries, "usage": usage_of(wanted, choices)}

    def completion_piece(self, index: int, choice: Choice, piece: str, known: list[Logprob]) -> dict[str, Any]:
        wanted = isinstance(self.body, CompletionBody) and self.body.logprobs is not None
        tokens = [each.token for each in known]
        found = completion_logprobs(self.serving.tokenizer, known, tokens, choice.offsets) if wanted else None
        return {"index": index, "text": piece, "logprobs": found, "finish_reason": choice.finish}

    def chat_piece(self, index: int, choice: Choice, piece: str, known: list[Logprob]) -> dict[str, Any]:
        found = chat_logprobs(self.serving.tokenizer, known) if known else None
        role = {} if choice.begun else {"role": "assistant"}  # said once
        choice.begun, delta = True, role | {"content": piece}
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": choice.finish}

    def _choice(self) -> Choice:
        tokenizer = self.serving.tokenizer
        return Choice(None if tokenizer is None else TextStream(tokenizer, self.body.stops), Offsets(tokenizer))

    def _admit(self, wanted: Wanted) -> None:
        serving = self.serving
        if not serving.engine.alive:
            raise EngineDied(serving.engine.error or "the engine's process is gone")
        if serving.draining:
            raise Refused(503, "the server is about to stop", "draining")
        if serving.engine.requests + len(wanted) > serving.waiting:
            raise Refused(429, f"more than {serving.waiting} requests are waiting; try again later", "overloaded")

    async def _pieces(
        self, choice: Choice, prompt: list[int], sampling: Sampling
    ) -> AsyncIterator[tuple[str, list[Logprob]]]:
        """New text and what is known of its tokens; `choice` is brought up to date before each."""
        begin, meters = time.perf_counter(), self.meters
        outcome = "aborted"
        try:
            async with contextlib.aclosing(self.serving.engine.generate(prompt, sampling)) as updates:
                async for update in updates:
                    if not choice.tokens:
                        meters.first.observe(time.perf_counter() - begin)
                        choice.prompt_logprobs, choice.cached = update.prompt_logprobs, update.cached
                        meters.prompt.inc(len(prompt))
                        meters.cached.inc(update.cached)
                    meters.output.inc(len(update.tokens))
                    piece = self._take(choice, update.tokens, ended=update.finish == "stop")
                    choice.logprobs += update.logprobs
                    choice.pooled = None if update.pooled is None else torch.from_numpy(update.pooled)
                    choice.finish = "stop" if choice.stream is not None and choice.stream.stopped else update.finish
                    if choice.finish is not None and choice.stream is not None:
                        piece += choice.stream.end()
                    outcome = choice.finish or outcome
                    yield piece, update.logprobs
                    if choice.finish is not None:
                        return
        finally:
            meters.requests.labels(outcome).inc()
            meters.whole.observe(time.perf_counter() - begin)

    @staticmethod
    def _take(choice: Choice, tokens: Sequence[int], *, ended: bool) -> str:
        piece = ""
        for place, token in enumerate(tokens):
            choice.tokens.append(token)
            last = ended and place == len(tokens) - 1  # the token that ends a text is not part of it
            if choice.stream is not None and not last:
                piece += choice.stream.push(token)
        return piece


def best_of(choices: Sequence[Choice], n: int) -> Sequence[Choice]:
    """The n choices with the highest mean log probability, best first; all, in their order, if there are no more."""
    if len(choices) == n:
        return choices
    mean = [sum(each.logprob for each in choice.logprobs) / max(len(choice.logprobs), 1) for choice in choices]
    return [choices[i] for i in sorted(range(len(choices)), key=lambda i: -mean[i])[:n]]


def completion_entry(
    serving: Serving, body: CompletionBody, index: int, prompt: list[int], choice: Choice
) -> dict[str, Any]:
    text, tokens = choice.text, choice.tokens
    found: list[Logprob | None] = list(choice.logprobs)
    if body.echo:
        text = (serving.tokenizer.decode(prompt) if serving.tokenizer is not None else "") + text
        tokens, found = [*prompt, *tokens], [None, *choice.prompt_logprobs, *found]
    wanted = body.logprobs is not None
    logprobs = completion_logprobs(serving.tokenizer, found, tokens, choice.offsets) if wanted else None
    entry = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
    return entry if serving.tokenizer is not None else {**entry, "tokens": tokens}


def usage_of(wanted: Wanted, choices: Sequence[Choice]) -> dict[str, Any]:
    """Several choices share a prompt, which counts once. The first of them that ran has computed it for the others."""
    prompts = {id(prompt): len(prompt) for prompt, _ in wanted}
    cached = dict(prompts)
    for (prompt, _), choice in zip(wanted, choices, strict=True):
        cached[id(prompt)] = min(cached[id(prompt)], choice.cached)
    given, made = sum(prompts.values()), sum(len(choice.tokens) for choice in choices)
    total = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    return {**total, "prompt_tokens_details": {"cached_tokens": sum(cached.values())}}


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
