"""Steps as CUDA graphs: the texts are those of the same engine without them, whatever happens in between."""

from typing import Any

import pytest
import torch

import treadle
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request, Sampling
from treadle.nn.store import cast
from treadle.nn.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

GATED = {"kind": "gated", "dim": 64}
MIXTURE = {"kind": "moe", "experts": 4, "top_k": 2, "dim": 32}
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 16, "qk_norm": {"kind": "rms"}}
LATENT = {"kind": "latent_attention", "heads": 2, "kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "value_dim": 16}
LAYERS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "attention": [(ATTENTION, GATED), (ATTENTION, GATED)],
    "windows": [({**ATTENTION, "window": 6}, GATED), (ATTENTION, GATED), ({**ATTENTION, "window": 40}, GATED)],
    "recurrent": [({"kind": "gated_delta", "heads": 2, "head_dim": 16}, GATED), (ATTENTION, GATED)],
    "latent": [(LATENT, GATED), (LATENT, GATED)],
}
PROMPTS = [[(7 * i + j) % 61 for j in range(1 + 13 * i)] for i in range(7)]


def tiny(name: str) -> Transformer:
    layers = [{"kind": "pre_norm", "mixer": mixer, "feedforward": forward} for mixer, forward in LAYERS[name]]
    model = treadle.build({"dim": 32, "vocab_size": 61, "max_length": 2048, "layers": layers}, seed=3).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that texts differ
    return model


def engine(model: Transformer, graphs: bool, **keys: Any) -> Engine:
    return Engine(
        model, EngineConfig(**{"slots": 5, "budget": 48, "page": 16, "cache_tokens": 4096} | keys, graphs=graphs)
    )


def captured(engine: Engine) -> int:
    return len(engine.runner.decoder.steps) if engine.runner.decoder else 0


@pytest.mark.parametrize("policy", ["throughput", "latency"])
@pytest.mark.parametrize("name", LAYERS)
def test_greedy_texts_are_those_without_graphs(name: str, policy: str) -> None:
    model, texts = tiny(name), []
    for graphs in (False, True):
        one = engine(model, graphs, policy=policy, cache_tokens=208)
        requests: list[Request] = []
        for step in range(400):
            if step < 7:  # they arrive one by one, and pages run out
                requests.append(one.add(PROMPTS[step], Sampling(max_tokens=20 + 5 * step, temperature=0)))
            if step == 30:
                one.abort(requests[2])
            one.step()
        assert not one.busy
        assert one.scheduler.preemptions or name == "recurrent"
        texts.append([request.outputs for request in requests if request.finish == "length"])
        assert (captured(one) > 1) == graphs
    assert texts[0] == texts[1]


def test_a_seed_gives_the_same_text_in_any_company() -> None:
    one = engine(tiny("attention"), True)
    asked = [Sampling(max_tokens=40, temperature=0.9, seed=seed) for seed in range(7)]
    together = [done.outputs for done in one.generate(PROMPTS, asked)]
    alone = [one.generate([prompt], sampling)[0].outputs for prompt, sampling in zip(PROMPTS, asked, strict=True)]
    without = [done.outputs for done in engine(one.model, False).generate(PROMPTS, asked)]
    assert together == alone == without
    assert together[0] != one.generate([PROMPTS[0]], Sampling(max_tokens=40, temperature=0.9, seed=9))[0].outputs


def test_what_is_rarely_asked_for() -> None:
    model = tiny("windows")
    asked: list[dict[str, Any]] = [
        {"top_k": 3, "temperature": 1.3},
        {"presence_penalty": 1.5, "repetition_penalty": 1.2},
        {"logit_bias": {5: 3.0}, "logprobs": 2},
        {"min_tokens": 15, "stop_tokens": (1, 2, 3, 4, 5, 6, 7, 8)},
        {"prompt_logprobs": True, "logprobs": 0},
        {"temperature": 0},
        {"min_p": 0.1, "top_p": 0.7},
    ]
    sampling = [Sampling(max_tokens=30, seed=1, **each) for each in asked]
    found, expected = (engine(model, graphs).generate(PROMPTS, sampling) for graphs in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert a.outputs == b.outputs
        for mine, other in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            assert [x.logprob for x in mine] == pytest.approx([x.logprob for x in other], abs=1e-3)
            assert [list(x.top) for x in mine] == [list(x.top) for x in other]


def test_other_weights_and_sleep_after_capture() -> None:
    one, greedy = engine(tiny("attention"), True), Sampling(max_tokens=30, temperature=0)
    before = [done.outputs for done in one.generate(PROMPTS, greedy)]
    assert captured(one)
    changed = {n: torch.randn_like(p) for n, p in one.model.named_parameters() if "qkv" in n}
    one.update_weights(changed)
    after = [done.outputs for done in one.generate(PROMPTS, greedy)]
    assert after != before
    assert after == [done.outputs for done in engine(one.model, False).generate(PROMPTS, greedy)]
    one.sleep()
    assert not captured(one)
    other = torch.full((1 << 24,), float("nan"), device="cuda")  # where the cache may have been
    one.wake()
    assert after == [done.outputs for done in one.generate(PROMPTS, greedy)]
    assert captured(one)
    del other


def test_a_model_that_waits_for_the_device_is_served_without() -> None:
    layer = {"kind": "pre_norm", "mixer": ATTENTION, "feedforward": {**MIXTURE, "compute": "loop"}}
    model = treadle.build({"dim": 32, "vocab_size": 61, "max_length": 256, "layers": [layer]}, seed=3).cuda()
    one, greedy = engine(model, True), Sampling(max_tokens=20, temperature=0)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        found = one.generate(PROMPTS, greedy)
    assert not captured(one)
    expected = engine(model, False).generate(PROMPTS, greedy)
    assert [done.outputs for done in found] == [done.outputs for done in expected]


def test_a_mixture() -> None:
    """In bf16, in which no expert's rows are counted on the host; as many rows with graphs as without."""
    layer = {"kind": "pre_norm", "mixer": ATTENTION, "feedforward": MIXTURE}
    config = {"dim": 32, "vocab_size": 61, "max_length": 256, "layers": [layer, layer]}
    model = cast(treadle.build(config, seed=3).cuda(), torch.bfloat16)
    texts = []
    for graphs in (True, False):
        one = engine(model, graphs, slots=4)
        done = one.generate([[i, 2, 3, 4] for i in range(4)], Sampling(max_tokens=40, temperature=0))
        texts.append([request.outputs for request in done])
        assert bool(captured(one)) == graphs
    assert texts[0] == texts[1]


def test_long_texts_and_many_rows() -> None:
    """Over the borders of tables' widths and of graphs' rows, in bf16."""
    model = cast(tiny("attention"), torch.bfloat16)
    one = engine(model, True, slots=40, budget=4096, page=16, cache_tokens=40 * 700)
    asked = [Sampling(max_tokens=200 + 10 * i, temperature=0) for i in range(40)]
    done = one.generate([[i + 1] * 50 for i in range(40)], asked)
    assert [len(request.outputs) for request in done] == [200 + 10 * i for i in range(40)]
    assert len({key[0] for key in one.runner.decoder.steps}) >= 5
    assert len({key[1] for key in one.runner.decoder.steps}) >= 2
    assert all(pool.free == pool.count for pool in one.tables.pools)
