"""What a captured step computes, on a CPU: rows of nobody change nothing, and are as many as they should be."""

from typing import Any

import pytest
import torch

import treadle
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.graphs import rows_for
from treadle.inference.request import Request, Sampling
from treadle.inference.sampler import plain_from
from treadle.inference.scheduler import Work
from treadle.nn.transformer import Transformer

MIXTURE = {"kind": "moe", "experts": 4, "top_k": 2, "dim": 16}
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2}


def tiny(feedforward: dict[str, Any]) -> Transformer:
    layers = [{"kind": "pre_norm", "mixer": ATTENTION, "feedforward": feedforward}]
    model = treadle.build({"dim": 16, "vocab_size": 61, "max_length": 96, "layers": layers}, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that texts differ
    return model


def engine(model: Transformer, **keys: Any) -> Engine:
    made = Engine(model, EngineConfig(**{"slots": 7, "page": 4, "cache_tokens": 400} | keys))
    made.runner.use_graphs(made.max_length)
    return made


def test_rows_of_graphs() -> None:
    assert [rows_for(n, 100) for n in (1, 2, 3, 5, 9, 16, 17, 32, 33, 97, 100)] == [
        1,
        2,
        4,
        8,
        16,
        16,
        32,
        32,
        48,
        100,
        100,
    ]
    for slots in (1, 3, 16, 57):
        assert all(n <= rows_for(n, slots) <= slots for n in range(1, slots + 1))


def test_samples_are_those_of_steps_without_rows_of_nobody() -> None:
    model = tiny(MIXTURE)
    prompts = [[i + 1] * (3 + i) for i in range(6)]
    asked = [
        *(Sampling(max_tokens=9 + i, temperature=0.8, seed=i, logprobs=0) for i in range(4)),
        Sampling(max_tokens=20, top_k=3, seed=4, min_tokens=3, stop_tokens=(1, 2, 3, 4, 5, 6, 7, 8)),
        Sampling(max_tokens=7, temperature=0, presence_penalty=0.5, logprobs=2),
    ]
    plain = Engine(model, EngineConfig(slots=7, page=4, cache_tokens=400))
    for found, expected in zip(engine(model).generate(prompts, asked), plain.generate(prompts, asked), strict=True):
        assert found.outputs == expected.outputs
        assert [x.token for x in found.logprobs] == found.outputs[: len(found.logprobs)]
        assert [x.logprob for x in found.logprobs] == pytest.approx([x.logprob for x in expected.logprobs], abs=1e-5)
        assert [list(x.top) for x in found.logprobs] == [list(x.top) for x in expected.logprobs]


def test_steps_are_made_once_for_their_size_and_dropped_in_sleep() -> None:
    made = engine(tiny({"kind": "gated", "dim": 32}))
    prompts, greedy = [[i + 1] * 5 for i in range(6)], Sampling(max_tokens=8, temperature=0)
    made.generate(prompts, greedy)
    assert made.runner.decoder is not None
    assert set(made.runner.decoder.steps) == {(7, 16, True)}
    made.generate(prompts[:1], Sampling(max_tokens=80, temperature=0))
    made.generate(prompts[:1], Sampling(max_tokens=3, top_k=2))
    assert set(made.runner.decoder.steps) == {(7, 16, True), (1, 16, True), (1, 24, True), (1, 16, False)}
    made.sleep()
    assert not made.runner.decoder.steps


def test_experts_with_a_capacity_are_not_shared_with_nobody() -> None:
    made = engine(tiny({**MIXTURE, "capacity": 1.5}))
    made.generate([[1, 2, 3]] * 3, Sampling(max_tokens=4, temperature=0))
    assert made.runner.decoder is not None
    assert not made.runner.decoder.steps


def test_from_where_on_a_draw_is_plain() -> None:
    def of(**asked: Any) -> int:
        return plain_from(Request([1, 2, 3], Sampling(**asked), ends=frozenset({5})))

    assert of() == of(temperature=0, logprobs=0, seed=3) == 0
    assert of(min_tokens=4) == 7
    rare = {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 1}, {"logit_bias": {1: 2.0}}
    rare += {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"repetition_penalty": 1.1}  # type: ignore[assignment]
    assert all(of(**each) > 1 << 60 for each in rare)


@pytest.mark.parametrize("ahead", [0, 1])
def test_tokens_of_a_batch_are_those_of_a_loop(ahead: int) -> None:
    made = engine(tiny(MIXTURE))
    made.runner.sampler.latest_S[:] = torch.arange(100, 108)
    works, expected = [], []
    for slot, (prompt, outputs, begin) in enumerate([(5, 0, 0), (9, 3, 4), (1, 6, 6), (4, 4, 2), (3, 2, 4)]):
        request = Request(list(range(prompt)), Sampling(), outputs=[50 + i for i in range(outputs)], slot=slot)
        request.in_flight = ahead
        works.append(Work(request, begin, request.length, True))
        for position in range(begin, request.length):
            token = request.token(position)
            expected.append(100 + slot if token is None else token)
    starts = torch.tensor([0, *(work.end - work.begin for work in works)]).cumsum(0).numpy()
    assert made.runner._tokens(works, starts).tolist() == expected


def test_hidden_states_and_guesses_go_by_other_steps() -> None:
    model = tiny({"kind": "gated", "dim": 32})
    prompts, greedy = [[i + 1] * 5 for i in range(3)], Sampling(max_tokens=12, temperature=0)
    expected = [done.outputs for done in Engine(model, EngineConfig(slots=7, page=4)).generate(prompts, greedy)]
    made = engine(model, speculate=2)
    assert [done.outputs for done in made.generate(prompts, greedy)] == expected
    tapped = engine(model)
    done = tapped.generate(prompts, greedy, taps=["layers.0"])
    assert [request.outputs for request in done] == expected
    assert all(request.hidden["layers.0"].shape == (16, 16) for request in done)
    assert tapped.runner.decoder is not None
    assert not tapped.runner.decoder.steps
    assert [request.outputs for request in tapped.generate(prompts, greedy)] == expected
    assert tapped.runner.decoder.steps
