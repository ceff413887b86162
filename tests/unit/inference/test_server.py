"""The server as its clients see it: OpenAI's own client, raw bodies, clients that go away, an engine that dies."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import psutil
import pytest
import torch

import treadle
from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.families.checkpoint import save as save_as_theirs
from treadle.inference.generate import stream
from treadle.inference.protocol import ChatBody, CompletionBody, EmbeddingBody, blamed
from treadle.nn.store import save_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}T{{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = BytesTokenizerConfig().build()
KEY = "secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("served") / "tiny"
    mixer = {"kind": "attention", "heads": 2}
    layers = [{"kind": "pre_norm", "repeat": 2, "mixer": mixer, "feedforward": {"kind": "gated", "dim": 32}}]
    model = treadle.build({"dim": 16, "vocab_size": 320, "max_length": 128, "layers": layers}, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    save_model(model, where)
    TOKENIZER.save(where / "tokenizer")
    (where / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    return where


class Server:
    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "treadle", "serve", str(folder), "--port", "0", "--device", "cpu", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"serving (\S+) at (\S+)/v1", line):
                self.name, self.address = found[1], found[2]
                return
        raise AssertionError(said)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers={"authorization": f"Bearer {KEY}"}, timeout=60, **options)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = Server(
        folder, "cache_tokens=2048", "page=8", "slots=16", "--api-key", KEY, "--name", "tiny", "--pooling", "last"
    )
    yield started
    started.process.terminate()
    assert started.process.wait(60) == 0


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return treadle.load(folder, device="cpu")[0]


def greedy(model: Any, prompt: str, tokens: int) -> str:
    ids = [*TOKENIZER.encode(prompt)]
    found = [token for (token,) in stream(model, ids, max_new_tokens=tokens, temperature=0)]
    if TOKENIZER.eos_id in found:
        found = found[: found.index(TOKENIZER.eos_id)]
    return TOKENIZER.decode(found).rstrip("\ufffd")


def test_a_completion_is_the_models_own_text(client: openai.OpenAI, model: Any) -> None:
    done = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0)
    assert done.choices[0].text.rstrip("\ufffd") == greedy(model, "hello", 12)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 12)
    assert done.choices[0].finish_reason == "length"
    both = client.completions.create(model="tiny", prompt=["hello", "there"], max_tokens=6, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "once", "max_tokens": 20, "seed": 3, "temperature": 1.5}
    whole = client.completions.create(**asked).choices[0]
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.text
    assert pieces[-2].choices[0].finish_reason == whole.finish_reason
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens > 0
    several = client.completions.create(**asked, n=3)
    assert several.choices[0].text == whole.text
    assert len({choice.text for choice in several.choices}) > 1
    client.completions.create(**{**asked, "seed": 2**63 - 1}, n=2)


def test_echo_gives_the_log_probabilities_of_the_prompt(client: openai.OpenAI, model: Any) -> None:
    """As lm-evaluation-harness asks for them."""
    done = client.completions.create(model="tiny", prompt="abcde", max_tokens=0, echo=True, logprobs=1, temperature=0)
    ids = TOKENIZER.encode("abcde")
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    found = done.choices[0].logprobs
    assert done.choices[0].text == "abcde"
    assert found is not None
    assert found.token_logprobs is not None
    assert found.tokens == list("abcde")
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx([expected[i, ids[i + 1]].item() for i in range(4)], abs=1e-4)
    assert list((found.top_logprobs or [])[1].values()) == pytest.approx([expected[0].max().item()], abs=1e-4)


@pytest.fixture(scope="module")
def peer(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model as transformers' own."""
    transformers = pytest.importorskip("transformers")
    where = tmp_path_factory.mktemp("peer")
    save_as_theirs(model, where)
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)


def likelihood(peer: Any, context: list[int], target: list[int]) -> tuple[float, bool]:
    """log p(target | context) by transformers, and whether greedy decoding would have said it."""
    with torch.no_grad():
        scores = peer(torch.tensor([[*context, *target]])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(target)
    return scores.gather(1, wanted[:, None]).sum().item(), bool((scores.argmax(-1) == wanted).all())


TASKS = [("once upon", " a time"), ("the end", " of it"), ("x", "y" * 40), ("once upon", " the hill"), ("é", "漢字")]


def test_likelihoods_as_lm_evaluation_harness_asks_for_them(server: Server, peer: Any) -> None:
    """Its request of 0.4.13 for `local-completions`, word for word, and its way to read the answer."""
    pairs = [(TOKENIZER.encode(context), TOKENIZER.encode(target)) for context, target in TASKS]
    whole = peer.generate(torch.tensor([pairs[0][0]]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    pairs.append((pairs[0][0], whole[len(pairs[0][0]) :].tolist()))  # one that is greedy
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "model": "tiny"}
    with server.client() as client:
        done = client.post("/v1/completions", json={**asked, "prompt": [[*a, *b] for a, b in pairs]}).json()
    for (context, target), choice in zip(pairs, sorted(done["choices"], key=lambda c: c["index"]), strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
        top = choice["logprobs"]["top_logprobs"][len(context) : -1]
        expected, greedy = likelihood(peer, context, target)
        assert sum(logprobs) == pytest.approx(expected, abs=1e-3)
        assert all(one == max(best.values()) for one, best in zip(logprobs, top, strict=True)) == greedy
    assert greedy


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_lm_evaluation_harness_itself(
    server: Server, folder: Path, peer: Any, tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    harness = LocalCompletionsAPI(
        base_url=f"{server.address}/v1/completions",
        model="tiny",
        tokenizer=str(folder / "tokenizer"),
        tokenizer_backend="huggingface",
        tokenized_requests=tokens,
        max_length=128,
        batch_size=2 if tokens else 1,
        num_concurrent=1 if tokens else 4,
    )
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(TASKS)])
    for (context, target), (value, greedy) in zip(TASKS, found, strict=True):
        expected = likelihood(peer, TOKENIZER.encode(context), TOKENIZER.encode(target))
        assert (value, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])
    if tokens:  # as text, the end-of-text token that it begins with would be nothing but its name
        rolling = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a long walk",), 0)])
        expected = likelihood(peer, [TOKENIZER.eos_id], TOKENIZER.encode("a long walk"))
        assert rolling == [pytest.approx(expected[0], abs=1e-3)]
    options = {"until": ["\n"], "max_gen_toks": 9, "temperature": 0}
    (said,) = harness.generate_until([Instance("generate_until", {}, ("hello", options), 0)])
    ids = torch.tensor([TOKENIZER.encode("hello")])
    made = peer.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 5:].tolist()
    assert said.rstrip("\ufffd") == TOKENIZER.decode(made).split("\n")[0].rstrip("\ufffd")


def test_embeddings_are_hidden_states_of_transformers(client: openai.OpenAI, server: Server, peer: Any) -> None:
    texts = ["hello", "once upon a time", "hello"]
    found = client.embeddings.create(model="tiny", input=texts)  # which asks for base64
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, texts))
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    short = client.embeddings.create(model="tiny", input=TOKENIZER.encode("hello"), dimensions=5)
    expected = []
    for text in texts:
        with torch.no_grad():
            x_SD = peer.model(torch.tensor([TOKENIZER.encode(text)])).last_hidden_state[0]
        expected.append((x_SD[-1] / x_SD[-1].norm()).tolist())
    for index, vector in enumerate(expected):
        assert found.data[index].index == index
        assert found.data[index].embedding == pytest.approx(vector, abs=1e-4)
        assert plain.data[index].embedding == pytest.approx(
            found.data[index].embedding, abs=1e-6
        )  # another batch may round otherwise
    cut = torch.tensor(expected[0][:5])
    assert short.data[0].embedding == pytest.approx((cut / cut.norm()).tolist(), abs=1e-4)
    for wrong, key in (
        ({"input": "a", "dimensions": 17}, "dimensions"),
        ({"input": [5000]}, "input"),
        ({"input": "a" * 129}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ):
        with server.client() as raw:
            answer = raw.post("/v1/embeddings", json=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, key)


def test_a_prompt_that_is_only_read_makes_no_token(client: openai.OpenAI) -> None:
    """max_tokens 0 leaves the whole of max_length=128 to the prompt."""
    done = client.completions.create(model="tiny", prompt="x" * 128, max_tokens=0, echo=True, logprobs=0)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (128, 0, 128)
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].logprobs is not None
    assert len(done.choices[0].logprobs.token_logprobs or []) == 128


def test_offsets_of_tokens_are_places_in_the_text_streamed_or_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "é", "max_tokens": 30, "seed": 2, "logprobs": 0}
    letters = {"logit_bias": {str(byte): 100 for byte in b"abc"}}
    for more in ({}, letters):
        whole = client.completions.create(**asked, **more).choices[0]
        pieces = [piece.choices[0] for piece in client.completions.create(**asked, **more, stream=True)]
        offsets = [offset for piece in pieces if piece.logprobs for offset in piece.logprobs.text_offset or []]
        assert whole.logprobs is not None
        assert offsets == whole.logprobs.text_offset
        assert offsets == (sorted(offsets) if not more else list(range(30)))
    echoed = client.completions.create(model="tiny", prompt="aé漢b", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert echoed.logprobs is not None
    assert echoed.logprobs.text_offset == [0, 1, 1, 2, 2, 2, 3]  # a token for each byte


def test_cached_tokens_were_there_before_the_request(client: openai.OpenAI) -> None:
    """A prompt counts once, however many choices share it, and is not cached because another choice has computed it."""

    def cached(prompt: Any, n: int) -> tuple[int, int]:
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, n=n).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0

    first, second = "fresh " * 8, "other " * 8  # 48 tokens, in pages of 8; the last token is always computed
    assert cached(first, 4) == (48, 0)
    assert cached(first, 4) == (48, 40)
    assert cached(second, 1) == (48, 0)
    assert cached([first, second], 3) == (96, 80)


def test_a_null_is_the_same_as_nothing(client: openai.OpenAI, server: Server) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stream", "stop", "logit_bias", "min_p", "max_tokens"))
    with server.client() as raw:
        done = raw.post("/v1/completions", json={"prompt": "hello", "seed": 4, **nothing}).json()
        assert raw.post("/v1/completions", json={"prompt": "a", "max_token": None}).status_code == 400
    expected = client.completions.create(model="tiny", prompt="hello", seed=4)
    assert done["choices"][0]["text"] == expected.choices[0].text
    assert expected.usage is not None
    assert done["usage"]["completion_tokens"] == expected.usage.completion_tokens


def test_a_chat_goes_through_the_template(client: openai.OpenAI, model: Any) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    done = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    assert (done.choices[0].message.content or "").rstrip("\ufffd") == greedy(model, "[user]hi[assistant]", 8)
    content = done.choices[0].logprobs.content if done.choices[0].logprobs else None
    assert content
    assert len(content) == 8
    assert len(content[0].top_logprobs) == 2
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 8, "stream": True}
    deltas = [piece.choices[0].delta for piece in client.chat.completions.create(**asked, temperature=1e-50)]
    text = "".join(delta.content or "" for delta in deltas)
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert text == done.choices[0].message.content
    tool: Any = [{"type": "function", "function": {"name": "f"}}]
    with_tools = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1, tools=tool)
    assert with_tools.usage is not None
    assert done.usage is not None
    assert with_tools.usage.prompt_tokens == done.usage.prompt_tokens + len("T1")


def test_a_response_has_the_format_that_was_asked_for(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    messages: Any = [{"role": "user", "content": "hi"}]
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 40}
    for streamed in (False, True):
        done: Any = client.chat.completions.create(**asked, response_format=form, stream=streamed)
        pieces = [piece.choices[0].delta for piece in done] if streamed else [done.choices[0].message]
        assert json.loads("".join(piece.content or "" for piece in pieces)) in ({"a": True}, {"a": False})
    anything: Any = {"type": "json_object"}
    content = client.chat.completions.create(**asked, response_format=anything).choices[0].message.content
    assert (content or "").startswith("{")
    date: Any = {"response_format": {"type": "regex", "regex": r"20\d\d-(0[1-9]|1[0-2])"}}
    made = client.completions.create(model="tiny", prompt="a", max_tokens=20, extra_body=date).choices[0]
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", made.text)
    assert made.finish_reason == "stop"
    for wrong, said in (
        ({"type": "regex", "regex": "(a"}, "response_format: no regex that can be followed"),
        ({"type": "json_schema"}, "type 'json_schema' goes with 'json_schema'"),
        ({"type": "text", "regex": "a"}, "type 'text' goes without 'regex'"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="a", extra_body={"response_format": wrong})
        assert said in caught.value.message
        assert caught.value.param == "response_format"


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "stop", "max_tokens": 40, "seed": 5}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[4:6]
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.find(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("completions", {"prompt": "a", "max_token": 3}, 400, "max_token: not known here. Did you mean 'max_tokens'?"),
        ("completions", {"prompt": "a", "temperature": 5}, 400, "temperature: Input should be less than"),
        ("completions", {"prompt": "a", "max_tokens": 1000}, 400, "max_length=128"),
        ("completions", {"prompt": [5000]}, 400, "token 5000 is not in the vocabulary of 320"),
        ("completions", {"prompt": "a", "logit_bias": {"999": 1}}, 400, "token 999 is not in the vocabulary"),
        ("completions", {"prompt": "\ud800"}, 400, "half of a surrogate pair"),
        (
            "chat/completions",
            {"messages": [{}], "chat_template_kwargs": {"tools": []}},
            400,
            "a key of the body itself",
        ),
        ("completions", {"prompt": []}, 400, "prompt: the list is empty"),
        ("completions", {"prompt": "a", "model": "other"}, 404, "'other' is not here; this server has 'tiny'"),
        ("completions", {"max_tokens": 3}, 400, "prompt: Field required"),
        ("chat/completions", {"messages": []}, 400, "messages: List should have at least 1 item"),
        ("chat/completions", {"messages": [{"role": "tool"}]}, 400, "the chat template refuses them: no tools"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 200}]}, 400, "leave no room"),
    ],
)
def test_a_bad_body_says_what_is_wrong(server: Server, path: str, body: Any, status: int, said: str) -> None:
    def send(client: httpx.Client, body: Any) -> httpx.Response:
        kind = {"content-type": "application/json"}
        return client.post(f"/v1/{path}", content=json.dumps(body), headers=kind)  # which escapes what is no text

    with server.client() as client:
        answer = send(client, body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert said in error["message"]
        assert error["param"] is None or error["message"].startswith(error["param"])
        assert send(client, {**body, "stream": True}).status_code == status


def test_an_error_names_the_key_of_the_body(server: Server) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": "a", "max_tokens": 1000}, "max_tokens"),
        ({"prompt": "a", "model": "other"}, "model"),
        ({"prompt": "a", "stream": True, "echo": True}, "stream"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
    ]
    with server.client() as client:
        for body, key in cases:
            assert client.post("/v1/completions", json=body).json()["error"]["param"] == key
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 200}]})
        assert chat.json()["error"]["param"] == "messages"


def test_an_error_of_the_engine_names_the_key_of_the_body() -> None:
    for body, key in ((ChatBody, "messages"), (CompletionBody, "prompt"), (EmbeddingBody, "input")):
        assert blamed("prompt: it is empty", body) == (key, f"{key}: it is empty")
    assert blamed("stop_tokens: no", CompletionBody) == ("stop_token_ids", "stop_token_ids: no")
    assert blamed("weights: gone", ChatBody) == (None, "weights: gone")


def test_the_key_is_asked_for_and_broken_json_is_no_crash(server: Server) -> None:
    with server.client() as client:
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        broken = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert (broken.status_code, broken.json()["error"]["param"]) == (400, "body")
        assert client.get("/health").json() == {"status": "ok"}


def metric(client: httpx.Client, name: str) -> float:
    found = dict(line.split(" ") for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    return float(found[f"treadle_engine_{name}"])


def idle(client: httpx.Client) -> bool:
    return metric(client, "running") == metric(client, "waiting") == 0


def test_many_clients_of_which_some_go_away_leave_nothing_behind(server: Server) -> None:
    async def one(client: httpx.AsyncClient, number: int) -> str:
        body = {"prompt": f"number {number}", "max_tokens": 24, "stream": number % 2 == 0, "seed": number}
        try:
            patience = 0.05 if number % 3 == 0 else 60
            answer = await client.post("/v1/completions", json=body, timeout=patience)
            return str(answer.status_code)
        except httpx.TimeoutException:
            return "gone"

    async def everybody() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.address, headers=headers, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(150)))

    found = asyncio.run(everybody())
    assert found.count("200") >= 100
    assert found.count("gone") > 0
    with server.client() as client:
        deadline = time.time() + 20
        while not idle(client) and time.time() < deadline:
            time.sleep(0.2)
        assert idle(client)


def test_an_engine_that_guesses_and_then_dies(folder: Path, model: Any) -> None:
    server = Server(folder, "cache_tokens=2048", "page=8", "speculate=3", "--draft", str(folder))
    try:
        (engine,) = [p for p in psutil.Process(server.process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        with httpx.Client(base_url=server.address, timeout=60) as client:
            asked = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
            text = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
            assert text.rstrip("\ufffd") == greedy(model, "hello", 12)
            assert 0 < metric(client, "proposed") == metric(client, "accepted") < 12
            refused = client.post("/v1/embeddings", json={"input": "a"})
            with client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 100, "stream": True}) as s:
                lines = s.iter_lines()
                next(lines)
                engine.send_signal(signal.SIGKILL)
                rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert "start it with --pooling" in refused.json()["error"]["message"]
            assert "engine's process ended with code -9" in rest[-1]["error"]["message"]
            assert client.get("/health").status_code == 503
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
    finally:
        server.process.terminate()
        server.process.wait(60)
