"""Draws against the distributions that the filters define, and penalties against their formulas."""

from typing import Any

import pytest
import torch

from treadle.inference.request import Request, Sampling
from treadle.inference.sampler import Sampler
from treadle.kernels.draw import uniform

V, DRAWS = 40, 8000
LOGITS_V = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 1.3


def running(slot: int = 0, prompt: tuple[int, ...] = (1,), outputs: tuple[int, ...] = (), **asked: Any) -> Request:
    return Request(list(prompt), Sampling(**asked), outputs=list(outputs), slot=slot, in_flight=1)


def kept(scores_V: torch.Tensor, asked: dict[str, Any]) -> torch.Tensor:
    """The probabilities after temperature, min-p, top-k and top-p, one token at a time."""
    p = (scores_V.double() / asked.get("temperature", 1.0)).softmax(0)
    p = torch.where(p >= asked.get("min_p", 0) * p.max(), p, 0)
    order = p.argsort(descending=True).tolist()[: asked.get("top_k", V)]
    total, chosen = sum(p[i].item() for i in order), torch.zeros(V, dtype=torch.float64)
    before = 0.0
    for i in order:
        if before < asked.get("top_p", 1.0) or not before:
            chosen[i] = p[i]
        before += p[i].item() / total
    return chosen / chosen.sum()


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.4, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.2, "temperature": 1.2},
        {"top_k": 20, "top_p": 0.6, "min_p": 0.01},
    ],
)
def test_draws_follow_the_distribution(asked: dict[str, Any]) -> None:
    requests = [running(slot, seed=slot, **asked) for slot in range(DRAWS)]
    drawn = Sampler(DRAWS, V, torch.device("cpu")).draw(LOGITS_V.expand(DRAWS, V), requests)
    expected = kept(LOGITS_V, asked) * DRAWS
    found = torch.bincount(drawn.tokens_R, minlength=V).double()
    possible = expected > 0
    assert not found[~possible].any()
    square = ((found - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
    assert torch.allclose(drawn.logprobs_R, LOGITS_V.log_softmax(0)[drawn.tokens_R], atol=1e-5)


def test_a_seed_gives_the_same_token_in_any_company() -> None:
    logits = LOGITS_V.expand(5, V)
    others = [running(slot, seed=9 + slot, top_k=3, presence_penalty=1.0) for slot in range(4)]
    alone = Sampler(8, V, torch.device("cpu")).draw(logits[:1], [running(6, seed=42)])
    among = Sampler(8, V, torch.device("cpu")).draw(logits, [*others, running(5, seed=42)])
    assert among.tokens_R[-1] == alone.tokens_R[0]


def test_numbers_are_between_zero_and_one_and_even() -> None:
    u = uniform(torch.arange(3), torch.tensor([0, 5, 5]), 200_000)
    assert u.min() > 0
    assert u.max() < 1
    assert torch.allclose(u.mean(1), torch.full((3,), 0.5), atol=3e-3)
    assert torch.corrcoef(u).fill_diagonal_(0).abs().max() < 0.01


def test_penalties_are_their_formulas() -> None:
    asked = {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.3, "temperature": 0}
    request = running(2, prompt=(3, 4), outputs=(5, 5, 6), logit_bias={7: 2.5}, **asked)
    sampler = Sampler(4, V, torch.device("cpu"))
    scores = sampler._shifted(LOGITS_V[None].clone(), [request], torch.tensor([2]))[0]
    expected = LOGITS_V.clone()
    for token in (3, 4, 5, 6):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[5] -= 0.7 + 2 * 0.3
    expected[6] -= 0.7 + 0.3
    expected[7] += 2.5
    assert torch.allclose(scores, expected, atol=1e-6)
    drawn = sampler.draw(LOGITS_V[None], [request]).tokens_R[0]
    request.outputs.append(int(drawn))  # what was drawn counts from the next draw on
    again = sampler._shifted(LOGITS_V[None].clone(), [request], torch.tensor([2]))[0]
    assert again[drawn] < scores[drawn]


def test_a_request_that_comes_back_to_its_slot_is_counted_anew() -> None:
    asked = {"frequency_penalty": 0.5, "temperature": 0}
    sampler, slot = Sampler(4, V, torch.device("cpu")), torch.tensor([2])
    request = running(2, prompt=(3, 4), outputs=(5,), **asked)
    sampler._shifted(LOGITS_V[None].clone(), [request], slot)
    sampler.draw(LOGITS_V[None], [running(2, temperature=0)])  # another one in its slot
    request.outputs += [6, 6]  # elsewhere
    request.pages = []
    scores = sampler._shifted(LOGITS_V[None].clone(), [request], slot)[0]
    expected = LOGITS_V.clone()
    expected[5] -= 0.5
    expected[6] -= 1.0
    assert torch.allclose(scores, expected, atol=1e-6)


def test_an_end_does_not_come_too_early() -> None:
    likeliest = int(LOGITS_V.argmax())
    early = Request([1], Sampling(temperature=0, min_tokens=2), slot=0, in_flight=1, ends=frozenset({likeliest}))
    late = Request(
        [1], Sampling(temperature=0, min_tokens=2), outputs=[2, 3], slot=1, in_flight=1, ends=frozenset({likeliest})
    )
    tokens = Sampler(2, V, torch.device("cpu")).draw(LOGITS_V.expand(2, V), [early, late]).tokens_R
    assert tokens[0] != likeliest
    assert tokens[1] == likeliest
