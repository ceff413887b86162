"""An HTTP server that speaks OpenAI's API (`treadle serve`): completions and chats, streamed or whole."""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from treadle.data.chat import ChatTemplate
from treadle.data.tokenizer import Tokenizer
from treadle.errors import ConfigError, TreadleError
from treadle.inference.process import EngineDied, EngineProcess
from treadle.inference.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    Offsets,
    blamed,
    chat_logprobs,
    completion_logprobs,
    problem,
)
from treadle.inference.request import Logprob, Sampling
from treadle.inference.text_stream import TextStream


@dataclass
class Serving:
    """What the server serves, and within which limits.

    waiting: requests that may wait for the engine or run in it; more are told to come back (429). max_length: tokens of
    a request, prompt and answer.
    """

    name: str
    engine: EngineProcess
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    max_length: int
    key: str | None = None
    waiting: int = 4096
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
        for name in ("running", "waiting", "preemptions", "cache"):
            gauge = Gauge(f"treadle_engine_{name}", f"The engine's load: {name}", **named)
            gauge.set_function(lambda name=name: getattr(serving.engine.load, name))  # type: ignore[misc]


def make_app(serving: Serving) -> FastAPI:
    """The application. The engine has been started."""
    app, meters = FastAPI(title="Treadle", docs_url=None, redoc_url=None), Meters(serving)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        key, message = problem(error.errors(), _body(request))
        return _error(400, message, "invalid_value", key)

    @app.exception_handler(TreadleError)
    async def refused(request: Request, error: TreadleError) -> Response:
        status, code = 400, "invalid_value"
        if isinstance(error, Refused):
            status, code = error.status, error.code
        elif isinstance(error, EngineDied):
            status, code = 503, "engine_died"
        meters.requests.labels(code).inc()
        key, message = blamed(str(error), _body(request))
        return _error(status, message, code, key)

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "not_found")

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}: {error}", "internal_error")

    @app.middleware("http")
    async def keyed(request: Request, call: Callable[[Request], Any]) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        guarded = serving.key is not None and request.url.path.startswith("/v1/")
        if guarded and not hmac.compare_digest(given.encode(), (serving.key or "").encode()):
            return _error(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", "invalid_key")
        return await call(request)  # type: ignore[no-any-return]

    @app.get("/health")
    async def health() -> Response:
        if not serving.engine.alive:
            return _error(503, serving.engine.error or "the engine's process is gone", "engine_died")
        return JSONResponse({"status": "draining" if serving.draining else "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(meters.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Any:
        entry = {"id": serving.name, "object": "model", "owned_by": "treadle", "max_model_len": serving.max_length}
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        _check(serving, name)
        return {"id": serving.name, "object": "model", "owned_by": "treadle"}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Any:
        _check(serving, body.model)
        prompts = body.prompts(serving.tokenizer)
        drawn = max(body.best_of or body.n, body.n)
        if body.stream and (drawn > body.n or body.echo):
            raise ConfigError("stream: not together with best_of or echo; leave one of them out")
        if body.stops and serving.tokenizer is None:
            raise ConfigError("stop: the model has no tokenizer; give stop_token_ids")
        ranked = body.logprobs if drawn == body.n else max(body.logprobs or 0, 0)
        asked = [
            body.sampling(
                index,
                max_tokens=body.max_tokens,
                logprobs=ranked,
                prompt_logprobs=body.echo and body.logprobs is not None,
            )
            for index in range(drawn)
        ]
        wanted = [(prompt, sampling) for prompt in prompts for sampling in asked]
        answer = Answer(serving, meters, "cmpl", "text_completion", body)
        if body.stream:
            return await answer.streamed(request, wanted, answer.completion_piece)
        choices = await answer.whole(request, wanted)
        kept = [
            (prompt, choice)
            for start, prompt in enumerate(prompts)
            for choice in _best(choices[start * drawn : (start + 1) * drawn], body.n)
        ]
        return answer.message(
            [_completion(serving, body, index, prompt, choice) for index, (prompt, choice) in enumerate(kept)],
            wanted,
            choices,
        )

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Any:
        _check(serving, body.model)
        if serving.template is None or serving.tokenizer is None:
            raise ConfigError("messages: the model has no chat template; use /v1/completions, or give --chat-template")
        if taken := {"messages", "tools"} & set(body.chat_template_kwargs):
            raise ConfigError(f"chat_template_kwargs: {', '.join(sorted(taken))} is a key of the body itself")
        tools = None if body.tool_choice == "none" else body.tools
        prompt = serving.template.encode(serving.tokenizer, body.messages, tools=tools, **body.chat_template_kwargs)
        room = serving.max_length - len(prompt)
        if room < 1:
            raise ConfigError(f"messages: {len(prompt)} tokens leave no room in max_length={serving.max_length}")
        most = body.max_completion_tokens or body.max_tokens or room
        asked = [
            body.sampling(i, max_tokens=most, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
            for i in range(body.n)
        ]
        wanted = [(prompt, sampling) for sampling in asked]
        answer = Answer(serving, meters, "chatcmpl", "chat.completion", body)
        if body.stream:
            return await answer.streamed(request, wanted, answer.chat_piece)
        choices = await answer.whole(request, wanted)
        entries = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": chat_logprobs(serving.tokenizer, choice.logprobs) if body.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return answer.message(entries, wanted, choices)

    return app


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
                if self.body.usage_wanted:
                    yield _event({**self.head, "object": kind, "choices": [], "usage": _usage(wanted, choices)})
                yield "data: [DONE]\n\n"
            finally:  # also when the client goes away: what still runs is aborted
                for task in tasks:
                    task.cancel()

        return StreamingResponse(events(), media_type="text/event-stream")

    def message(self, entries: list[dict[str, Any]], wanted: Wanted, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self.head, "object": self.kind, "choices": entries, "usage": _usage(wanted, choices)}

    def completion_piece(self, index: int, choice: Choice, piece: str, known: list[Logprob]) -> dict[str, Any]:
        wanted = isinstance(self.body, CompletionBody) and self.body.logprobs is not None
        tokens = [each.token for each in known]
        found = completion_logprobs(self.serving.tokenizer, known, tokens, choice.offsets) if wanted else None
        return {"index": index, "text": piece, "logprobs": found, "finish_reason": choice.finish}

    def chat_piece(self, index: int, choice: Choice, piece: str, known: list[Logprob]) -> dict[str, Any]:
        found = chat_logprobs(self.serving.tokenizer, known) if known else None
        delta = {"role": "assistant", "content": piece}
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


def _best(choices: Sequence[Choice], n: int) -> Sequence[Choice]:
    """The n choices with the highest mean log probability, best first; all, in their order, if there are no more."""
    if len(choices) == n:
        return choices
    mean = [sum(each.logprob for each in choice.logprobs) / max(len(choice.logprobs), 1) for choice in choices]
    return [choices[i] for i in sorted(range(len(choices)), key=lambda i: -mean[i])[:n]]


def _completion(
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


def _usage(wanted: Wanted, choices: Sequence[Choice]) -> dict[str, Any]:
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


def _body(request: Request) -> type[Body]:
    return ChatBody if request.url.path.endswith("chat/completions") else CompletionBody


def _check(serving: Serving, name: str | None) -> None:
    if name not in (None, "", serving.name):
        raise Refused(404, f"model: '{name}' is not here; this server has '{serving.name}'", "model_not_found")


def _error(status: int, message: str, code: str, key: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": key, "code": code}}, status)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
