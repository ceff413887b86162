"""An HTTP server that speaks OpenAI's API (`treadle serve`): completions and chats, streamed or whole."""

import hmac
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from treadle.errors import ConfigError, TreadleError
from treadle.inference.answer import Answer, Meters, Refused, Serving, best_of, completion_entry
from treadle.inference.process import EngineDied
from treadle.inference.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    blamed,
    chat_logprobs,
    encoded_prompts,
    problem,
)
from treadle.inference.request import Sampling
from treadle.inference.states import embedding


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
        prompts = encoded_prompts(body.prompt, serving.tokenizer)
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
            for choice in best_of(choices[start * drawn : (start + 1) * drawn], body.n)
        ]
        return answer.message(
            [completion_entry(serving, body, index, prompt, choice) for index, (prompt, choice) in enumerate(kept)],
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

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Any:
        _check(serving, body.model)
        if serving.pooling is None:
            raise Refused(
                400, "this server has no embeddings; start it with --pooling mean or last, as the model was made", "off"
            )
        asked = Sampling(max_tokens=0, temperature=0, pooling=serving.pooling)
        wanted = [(prompt, asked) for prompt in encoded_prompts(body.input, serving.tokenizer)]
        choices = await Answer(serving, meters, "embd", "embedding", body).whole(request, wanted)
        vectors = [embedding(choice.pooled, body.dimensions) for choice in choices if choice.pooled is not None]
        entries = [
            {"object": "embedding", "index": index, "embedding": body.encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        tokens = sum(len(prompt) for prompt, _ in wanted)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": entries, "model": serving.name, "usage": usage}

    return app


def _body(request: Request) -> type[Body]:
    path = request.url.path
    bodies: dict[str, type[Body]] = {"/v1/chat/completions": ChatBody, "/v1/embeddings": EmbeddingBody}
    return bodies.get(path, CompletionBody)


def _check(serving: Serving, name: str | None) -> None:
    if name not in (None, "", serving.name):
        raise Refused(404, f"model: '{name}' is not here; this server has '{serving.name}'", "model_not_found")


def _error(status: int, message: str, code: str, key: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": key, "code": code}}, status)
