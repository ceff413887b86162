"""With guesses and without, the same tokens: greedy and sampled, alone and in company, whoever guesses."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import MODELS, VOCABULARY, alone, tiny

from treadle.errors import ConfigError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request, Sampling, Status
from treadle.inference.speculative import Draft, Lookup, Speculation
from treadle.nn.transformer import Transformer

CONFIG = {"slots": 4, "page": 4, "cache_tokens": 500}
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [1], [9, 9, 9, 9], [(7 * i) % VOCABULARY for i in range(30)], [3, 4] * 8]


def near(model: Transformer, name: str) -> Transformer:
    """A model that mostly agrees with another one."""
    other = tiny(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.03 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return other


def outputs(engine: Engine, sampling: Any) -> list[list[int]]:
    return [request.outputs for request in engine.generate(PROMPTS, sampling)]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8},
    "filtered": {"temperature": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "logit_bias": {3: 1.5}, "logprobs": 2},
    "early": {"temperature": 0.5, "min_tokens": 12, "stop_tokens": tuple(range(20))},
    "penalised": {"temperature": 0.7, "presence_penalty": 0.8, "repetition_penalty": 1.3},
}


CASES = [*(("windows", asked) for asked in SAMPLINGS), ("attention", "sampled"), ("latent", "greedy")]


@pytest.mark.parametrize(("name", "asked"), CASES)
@pytest.mark.parametrize("draft", [False, True], ids=["lookup", "draft"])
def test_guesses_change_nothing(name: str, asked: str, draft: bool) -> None:
    model = MODELS[name]
    each = [Sampling(max_tokens=24, seed=seed, **SAMPLINGS[asked]) for seed in range(len(PROMPTS))]
    plain = Engine(model, EngineConfig(**CONFIG)).generate(PROMPTS, each)
    for keys in ({}, {"budget": 9, "policy": "latency"}, {"cache_tokens": 80}):
        config = EngineConfig(**{**CONFIG, "speculate": 4, **keys})
        engine = Engine(model, config, draft=near(model, name) if draft else None)
        found = engine.generate(PROMPTS, each)
        assert [request.outputs for request in found] == [request.outputs for request in plain]
        assert [request.finish for request in found] == [request.finish for request in plain]
        for one, other in zip(found, plain, strict=True):
            assert [p.logprob for p in one.logprobs] == pytest.approx([p.logprob for p in other.logprobs], abs=1e-4)
            assert [p.token for p in one.logprobs] == [p.token for p in other.logprobs]
        facts = engine.speculation
        assert facts is not None
        if asked == "penalised":
            assert facts.proposed == 0
        elif draft or asked == "greedy":
            assert 0 < facts.accepted <= facts.proposed
        assert "cache_tokens" not in keys or engine.scheduler.preemptions
        assert all(pool.free == pool.count for pool in engine.tables.pools)
        if isinstance(facts.proposer, Draft):
            assert all(pool.free == pool.count for pool in facts.proposer.tables.pools)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_guesses_for_itself_is_always_right(temperature: float) -> None:
    """As both draw with the same noise; so a step yields 1 + 4 tokens."""
    model = MODELS["attention"]
    engine = Engine(model, EngineConfig(**CONFIG, speculate=4), draft=model)
    steps = 0
    launch = engine.runner.launch

    def counted(work: Any) -> Any:
        nonlocal steps
        steps += 1
        return launch(work)

    engine.runner.launch = counted  # type: ignore[method-assign]
    (done,) = engine.generate([[1, 2, 3]], Sampling(max_tokens=41, temperature=temperature, seed=3))
    assert engine.speculation is not None
    assert engine.speculation.accepted == engine.speculation.proposed == 32
    assert len(done.outputs) == 41
    assert steps == 1 + 8


def test_what_was_seen_is_guessed_again() -> None:
    lookup = Lookup()
    request = Request([1, 2, 3, 4, 1, 2], Sampling())
    assert lookup.propose([request], [3]) == [[3, 4, 1]]
    request.outputs += [3, 9]
    assert lookup.propose([request], [3]) == [[]]
    request.outputs += [2, 3]
    assert lookup.propose([request], [2]) == [[9, 2]]  # the latest place counts
    assert lookup.propose([Request([7, 7, 7], Sampling())], [5]) == [[7] * 5]
    assert lookup.propose([Request([1], Sampling()), Request([1, 1], Sampling())], [5, 5]) == [[], []]
    lookup.forget(request)
    assert request not in lookup._texts


@given(text=st.lists(st.sampled_from([0, 1, 256, 65536, 257]), min_size=1, max_size=40), limit=st.integers(1, 6))
def test_a_guess_is_what_a_search_finds(text: list[int], limit: int) -> None:
    """Also where a token's bytes are those of parts of others."""
    expected: list[int] = []
    for size in (4, 3, 2):
        places = [end for end in range(size, len(text)) if text[end - size : end] == text[len(text) - size :]]
        if places and size < len(text):
            longer = list(text)
            while len(longer) < len(text) + limit:
                longer.append(longer[places[-1] + len(longer) - len(text)])
            expected = longer[len(text) :]
            break
    cut = len(text) // 2 + 1
    request, lookup = Request(text[:cut], Sampling()), Lookup()
    lookup.propose([request], [limit])
    request.outputs += text[cut:]
    assert lookup.propose([request], [limit]) == [expected]


class Random:
    """Guesses anything, and now and then what is right."""

    def __init__(self, model: Transformer):
        self.model, self.draw = model, random.Random(1)

    def propose(self, requests: Any, limits: Any) -> list[list[int]]:
        return [self._guess(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def _guess(self, request: Request, limit: int) -> list[int]:
        size = self.draw.randint(0, limit)
        guess = alone(self.model, [*request.prompt, *request.outputs], limit)[:size]
        if guess and self.draw.random() < 0.7:
            guess[self.draw.randrange(size)] = self.draw.randrange(VOCABULARY)
        return guess

    def forget(self, request: Request) -> None:
        pass


@pytest.mark.parametrize("name", ["attention", "windows"])
@pytest.mark.parametrize("seed", range(4))
def test_wrong_guesses_leave_nothing_behind(name: str, seed: int) -> None:
    """Random guesses, arrivals, aborts and a small cache: what is kept is right, and so are pages that others share."""
    model, draw = MODELS[name], random.Random(seed)
    engine = Engine(model, EngineConfig(slots=3, budget=12, page=3, cache_tokens=90, speculate=5))
    engine.speculation = Speculation(Random(model), 5)
    engine.scheduler.drafts = engine.speculation.drafts
    beginning = [draw.randrange(VOCABULARY) for _ in range(12)]
    requests: list[Request] = []
    while len(requests) < 8 or engine.busy:
        if len(requests) < 8 and draw.random() < 0.4:
            prompt = [*beginning[: draw.choice([0, 7, 12])], draw.randrange(VOCABULARY)]
            again = [*requests[0].prompt, *requests[0].outputs[:6]] if requests and draw.random() < 0.3 else prompt
            requests.append(engine.add(again, Sampling(max_tokens=draw.randint(1, 25), temperature=0)))
        if requests and draw.random() < 0.03:
            engine.abort(draw.choice(requests))
        engine.step()
    assert 0 < engine.speculation.accepted < engine.speculation.proposed
    for request in requests:
        assert request.status is Status.FINISHED
        assert request.outputs == alone(model, request.prompt, 25)[: len(request.outputs)]
    assert all(pool.free == pool.count for pool in engine.tables.pools)


def test_states_and_sleep_go_with_guesses() -> None:
    model = MODELS["attention"]
    engine = Engine(model, EngineConfig(**CONFIG, speculate=3), draft=near(model, "attention"))
    greedy = Sampling(max_tokens=15, temperature=0)
    plain = Engine(model, EngineConfig(**CONFIG)).generate(PROMPTS, greedy, taps=["layers.1"])
    for request, other in zip(engine.generate(PROMPTS, greedy, taps=["layers.1"]), plain, strict=True):
        assert torch.allclose(request.hidden["layers.1"], other.hidden["layers.1"], atol=1e-4)
    engine.sleep()
    assert isinstance(engine.speculation.proposer if engine.speculation else None, Draft)
    assert not any(storage.layers for storage in engine._storages)
    engine.wake()
    assert outputs(engine, greedy) == [request.outputs for request in plain]


def test_what_cannot_guess_is_refused() -> None:
    recurrent, model = MODELS["recurrent"], MODELS["attention"]
    with pytest.raises(ConfigError, match="set speculate=0"):
        Engine(recurrent, EngineConfig(**CONFIG, speculate=2))
    with pytest.raises(ConfigError, match="draft: the model keeps a state"):
        Engine(model, EngineConfig(**CONFIG, speculate=2), draft=recurrent)
    with pytest.raises(ConfigError, match="such as speculate=4"):
        Engine(model, EngineConfig(**CONFIG), draft=model)
    larger = model.config.model_copy(update={"vocab_size": VOCABULARY + 1}).build()
    with pytest.raises(ConfigError, match=f"vocabulary of {VOCABULARY + 1} is larger than the model's {VOCABULARY}"):
        Engine(model, EngineConfig(**CONFIG, speculate=2), draft=larger)
