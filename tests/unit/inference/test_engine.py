"""The engine under any traffic: every request ends, says what it would say alone, and no page is lost."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import treadle
from treadle.errors import ConfigError
from treadle.inference import tables
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.generate import stream
from treadle.inference.pages import chain
from treadle.inference.request import Request, Sampling, Status
from treadle.nn.transformer import Transformer

VOCABULARY = 61
GATED = {"kind": "gated", "dim": 32}
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2}
MIXERS: dict[str, list[dict[str, Any]]] = {
    "attention": [ATTENTION, ATTENTION],
    "windows": [{**ATTENTION, "window": 6}, ATTENTION, {**ATTENTION, "window": 11}],
    "recurrent": [{"kind": "gated_delta", "heads": 2, "head_dim": 8}, ATTENTION],
    "latent": [{"kind": "latent_attention", "heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}],
}


def tiny(name: str) -> Transformer:
    layers = [{"kind": "pre_norm", "mixer": mixer, "feedforward": GATED} for mixer in MIXERS[name]]
    model = treadle.build({"dim": 16, "vocab_size": VOCABULARY, "max_length": 96, "layers": layers}, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that texts differ
    return model


MODELS = {name: tiny(name) for name in MIXERS}


def alone(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    return [token for (token,) in stream(model, prompt, max_new_tokens=tokens, temperature=0)]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10_000),
    slots=st.integers(1, 5),
    budget=st.integers(1, 40),
    page=st.sampled_from([1, 3, 8]),
    cache=st.integers(80, 200),
    policy=st.sampled_from(["throughput", "latency"]),
    ahead=st.booleans(),
    decoder=st.booleans(),
)
def test_whatever_arrives_and_leaves(
    name: str, seed: int, slots: int, budget: int, page: int, cache: int, policy: Any, ahead: bool, decoder: bool
) -> None:
    model, draw = MODELS[name], random.Random(seed)
    config = EngineConfig(slots=slots, budget=budget, page=page, cache_tokens=cache, policy=policy, ahead=ahead)
    engine = Engine(model, config)
    if decoder:  # what a GPU captures, with its rows of nobody
        engine.runner.use_graphs(engine.max_length)
    beginning = [draw.randrange(VOCABULARY) for _ in range(20)]
    plans = []
    for _ in range(8):
        own = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 20))]
        plans.append((beginning[: draw.choice([0, 7, 20])] + own, draw.randint(1, 15)))
    requests: list[Request] = []
    steps = 0
    while len(requests) < len(plans) or engine.busy:
        while len(requests) < len(plans) and draw.random() < 0.5:
            prompt, tokens = plans[len(requests)]
            requests.append(engine.add(prompt, Sampling(max_tokens=tokens, temperature=0)))
        if requests and draw.random() < 0.05:
            engine.abort(draw.choice(requests))
        engine.step()
        steps += 1
        assert steps < 5000, "it does not come to an end"
    for (prompt, tokens), request in zip(plans, requests, strict=True):
        expected = alone(model, prompt, tokens)
        assert request.status is Status.FINISHED
        assert request.finish in ("length", "abort")
        assert request.outputs == expected[: len(request.outputs)]
        assert request.finish == "abort" or len(request.outputs) == tokens
    assert all(pool.free == pool.count for pool in engine.tables.pools)
    assert sorted(engine.scheduler._slots) == list(range(slots))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_thousand_requests_with_random_aborts_leave_no_page_in_use(name: str) -> None:
    draw = random.Random(7)
    engine = Engine(MODELS[name], EngineConfig(slots=200, budget=2000, page=8, cache_tokens=4000))
    beginning = [draw.randrange(VOCABULARY) for _ in range(24)]
    requests = []
    for number in range(1000):
        own = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))]
        sampling = Sampling(max_tokens=draw.randint(1, 8), seed=number)
        requests.append(engine.add(beginning[: draw.choice([0, 16, 24])] + own, sampling))
    while engine.busy:
        for _ in range(4):
            engine.abort(draw.choice(requests))
        engine.step()
    aborted = sum(request.finish == "abort" for request in requests)
    assert 20 < aborted < 500
    assert sum(request.finish == "length" for request in requests) == 1000 - aborted
    assert all(pool.free == pool.count for pool in engine.tables.pools)
    assert engine.tables.free == 1
    assert sorted(engine.scheduler._slots) == list(range(200))
    assert not any(request.pages and any(request.pages) for request in requests)


def test_a_request_that_can_never_run_is_refused() -> None:
    engine = Engine(MODELS["attention"], EngineConfig(cache_tokens=32, page=8, slots=2))
    with pytest.raises(ConfigError, match="no token"):
        engine.add([])
    with pytest.raises(ConfigError, match=f"token 70 is not in the vocabulary of {VOCABULARY}"):
        engine.add([3, 70])
    with pytest.raises(ConfigError, match="max_length=96"):
        engine.add([1] * 90, Sampling(max_tokens=7))
    with pytest.raises(ConfigError, match="raise cache_tokens"):
        engine.add([1] * 30, Sampling(max_tokens=7))
    for wrong in ({"logit_bias": {VOCABULARY: 1.0}}, {"stop_tokens": (-1,)}, {"logit_bias": {3: float("nan")}}):
        with pytest.raises(ConfigError, match=r"not in the vocabulary|no finite number"):
            engine.add([3], Sampling(max_tokens=2, **wrong))
    with pytest.raises(ConfigError, match="no token"):
        engine.generate([[1, 2], []], Sampling(max_tokens=2))
    while engine.busy:  # what was queued before the wrong one is not left behind
        engine.step()


def test_a_step_that_fails_ends_its_requests_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["attention"]
    engine = Engine(model, EngineConfig(page=4, slots=2, cache_tokens=90))
    prompt, greedy = list(range(12)), Sampling(max_tokens=5, temperature=0)
    with monkeypatch.context() as broken:
        broken.setattr(engine.runner, "launch", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([prompt], greedy)
    assert not engine.busy
    (done,) = engine.generate([prompt], greedy)
    assert done.cached == 0  # the pages that were promised were never filled
    assert done.outputs == alone(model, prompt, 5)


def test_a_step_that_cannot_be_read_ends_its_requests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["attention"]
    engine = Engine(model, EngineConfig(page=4, slots=2, cache_tokens=90))
    prompt, greedy = list(range(12)), Sampling(max_tokens=5, temperature=0)
    request = engine.add(prompt, greedy)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_read", lambda launched: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert request.finish == "abort"
    assert engine.generate([prompt], greedy)[0].outputs == alone(model, prompt, 5)


def test_weights_may_change_after_an_end_that_nobody_saw_coming() -> None:
    model = tiny("attention")
    engine = Engine(model, EngineConfig(page=4, slots=2, cache_tokens=90))
    third = alone(model, [1, 2, 3], 3)[2]
    (done,) = engine.generate([[1, 2, 3]], Sampling(max_tokens=20, temperature=0, stop_tokens=(third,)))
    assert done.finish == "stop"  # a step that runs ahead was launched by then
    engine.update_weights({name: -p for name, p in model.named_parameters()})
    engine.sleep(), engine.wake()
    assert engine.generate([[1, 2, 3]], Sampling(max_tokens=5, temperature=0))[0].outputs == alone(model, [1, 2, 3], 5)


def test_any_integer_is_a_seed_and_none_is_another_one_each_time() -> None:
    model = MODELS["attention"]
    drawn = []
    for seed in (2**63, -(2**63), 7, 7, None, None):
        engine = Engine(model, EngineConfig(page=4, slots=2, cache_tokens=90))
        drawn.append(engine.generate([[1, 2]], Sampling(max_tokens=20, temperature=3.0, seed=seed))[0].outputs)
    assert drawn[2] == drawn[3]
    assert drawn[4] != drawn[5]


def test_pages_are_preempted_and_prompts_do_not_starve_others() -> None:
    model = MODELS["attention"]
    engine = Engine(model, EngineConfig(slots=8, budget=16, page=4, cache_tokens=64))
    prompts = [[i + 1] * 12 for i in range(8)]
    done = engine.generate(prompts, Sampling(max_tokens=20, temperature=0))
    assert engine.scheduler.preemptions > 0
    assert [request.outputs for request in done] == [alone(model, prompt, 20) for prompt in prompts]

    engine = Engine(model, EngineConfig(slots=64, budget=8, page=4, cache_tokens=2000))
    first = engine.add([1, 2, 3], Sampling(max_tokens=10, temperature=0))
    for step in range(400):  # a prompt arrives at every step, and none may keep the first from its tokens
        engine.add([step % VOCABULARY] * 8, Sampling(max_tokens=1))
        engine.step()
        if first.status is Status.FINISHED:
            break
    assert first.outputs == alone(model, [1, 2, 3], 10)


def test_who_comes_later_takes_no_pages_from_a_prompt_that_has_begun() -> None:
    engine = Engine(MODELS["attention"], EngineConfig(slots=16, budget=48, page=4, cache_tokens=112, policy="latency"))
    short = Sampling(max_tokens=4, temperature=0)
    for token in range(3):
        engine.add([token] * 7, short)
    engine.step(), engine.step()
    long = engine.add([9] * 80, Sampling(max_tokens=2, temperature=0))
    later = [engine.add([token] * 7, short) for token in range(4, 60)]
    while long.status is not Status.FINISHED:
        engine.step()
    assert not any(request.status is Status.FINISHED for request in later)


def test_a_request_that_waits_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[int] = []

    def counted(before: bytes, tokens: Any) -> bytes:
        named.append(len(tokens))
        return chain(before, tokens)

    monkeypatch.setattr(tables, "chain", counted)
    engine = Engine(MODELS["attention"], EngineConfig(slots=4, page=4, cache_tokens=96))
    prompts = [[number] * 48 for number in (1, 2, 3)]  # two of them fill the cache
    done = engine.generate(prompts, Sampling(max_tokens=20, temperature=0))
    assert [request.outputs for request in done] == [alone(MODELS["attention"], prompt, 20) for prompt in prompts]
    assert engine.scheduler.preemptions > 0
    assert len(named) == sum((48 + 20 - 1) // 4 for _ in prompts)  # the last token never becomes part of a page


def test_scores_are_those_of_the_whole_text_however_it_is_cut() -> None:
    model = MODELS["windows"]
    texts = [[(7 * i + k) % VOCABULARY for i in range(40 + k)] for k in range(3)]
    engine = Engine(model, EngineConfig(budget=13, page=4, slots=2, cache_tokens=90))
    engine.generate(texts, Sampling(max_tokens=3, temperature=0))  # so that beginnings are known
    for text, scores in zip(texts, engine.score(texts), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text]))[0, :-1].log_softmax(-1)
        assert scores == pytest.approx(expected.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist(), abs=1e-5)


def test_other_weights_give_other_texts_and_sleep_gives_memory_back() -> None:
    model, other = tiny("attention"), MODELS["windows"]
    engine = Engine(model, EngineConfig(page=4, slots=2, cache_tokens=90))
    prompt, greedy = list(range(12)), Sampling(max_tokens=5, temperature=0)
    before = alone(model, prompt, 5)
    assert engine.generate([prompt], greedy)[0].outputs == before
    changed = {name: torch.randn_like(p) for name, p in model.named_parameters() if "qkv" in name}
    request = engine.add(prompt, greedy)
    with pytest.raises(ValueError, match="requests are running"):
        engine.update_weights(changed)
    for _ in range(2):
        engine.step()
    engine.abort(request)  # with a step on its way, which is nobody's now
    for wrong in (torch.zeros(1), next(iter(changed.values())).to(torch.float8_e4m3fn)):
        with pytest.raises(ValueError, match=r"shape \[1\]|without its scales"):
            engine.update_weights({**changed, next(iter(changed)): wrong})
    assert alone(model, prompt, 5) == before
    engine.update_weights(changed)
    engine.sleep()
    assert not engine.runner.storage.layers
    engine.wake()
    buffers = engine.runner.storage.layers[0].buffers
    engine.wake()
    assert engine.runner.storage.layers[0].buffers is buffers  # steps that were captured know it
    (done,) = engine.generate([prompt], greedy)
    assert done.cached == 0
    assert done.outputs == alone(model, prompt, 5)
    with pytest.raises(ValueError, match=r"no weights layers\.2"):
        engine.update_weights(dict(other.named_parameters()))
