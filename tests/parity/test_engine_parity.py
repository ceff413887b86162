"""The engine against transformers' `generate`, greedy, token for token, on every family.

All prompts share a small cache: they are cut into chunks, wait for each other, and begin with what others computed.
"""

from pathlib import Path

import pytest
import torch
from families_zoo import CASES
from test_families_parity import published, reloaded

from treadle.families.checkpoint import load
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Sampling

transformers = pytest.importorskip("transformers")

NEW = 10
# Its rotary embedding changes once a text is longer than 32 tokens; transformers then computes the text anew.
CROSSES = dict.fromkeys(("phi3-longrope", "phi4-mini"), (1, 5, 17, 20, 12))


# The other policy matters to the scheduler, not to the family: a few will do.
BOTH = [(name, "throughput") for name in CASES] + [
    (name, "latency") for name, case in CASES.items() if case.config in ("Llama", "Gemma2", "DeepseekV3", "GptOss")
]


@pytest.mark.parametrize(("name", "policy"), BOTH)
def test_greedy_tokens_are_those_of_transformers(name: str, policy: str, tmp_path: Path) -> None:
    case = CASES[name]
    published(case, tmp_path)
    peer, model = reloaded(tmp_path, case.attention), load(tmp_path)
    peer.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    lengths = CROSSES.get(name, (1, 5, 17, 30, 12))
    prompts = [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths]
    prompts.append([*prompts[3][:17], 1, 2, 3])
    config = EngineConfig(slots=4, budget=16, page=4, cache_tokens=120, policy=policy)
    engine = Engine(model, config)
    if policy == "throughput":  # steps as a GPU captures them
        engine.runner.use_graphs(engine.max_length)
    done = engine.generate(prompts, Sampling(max_tokens=NEW, temperature=0, logprobs=2))
    for prompt, request in zip(prompts, done, strict=True):
        tokens_1S = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(tokens_1S), "pad_token_id": 0}
        expected = peer.generate(tokens_1S, max_new_tokens=NEW, do_sample=False, **options)[0, len(prompt) :]
        assert request.outputs == expected.tolist(), f"prompt of {len(prompt)} tokens"
        with torch.no_grad():
            scores = peer(torch.tensor([[*prompt, *request.outputs]])).logits[0].log_softmax(-1)
        for index, token in enumerate(request.outputs):
            found, expect = request.logprobs[index], scores[len(prompt) + index - 1]
            assert found.token == token == next(iter(found.top))
            assert found.logprob == pytest.approx(expect[token].item(), abs=1e-4)
            assert list(found.top.values()) == pytest.approx(expect.topk(2).values.tolist(), abs=1e-4)
    assert done[-1].cached == 16
    assert all(pool.free == pool.count for pool in engine.tables.pools)
