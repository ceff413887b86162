"""Hidden states out of the engine against those of whole texts, and embeddings against transformers' hidden states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import MODELS, VOCABULARY

from treadle.errors import ConfigError
from treadle.families.checkpoint import save
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Sampling

TEXTS = [[(3 * i + k) % VOCABULARY for i in range(5 + 11 * k)] for k in range(4)]
NAMES = ["layers.0", "layers.1.mixer", "norm"]


def whole(model: Any, tokens: list[int], name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("name", ["attention", "windows", "recurrent"])
@pytest.mark.parametrize(
    "keys", [{}, {"budget": 7}, {"cache_tokens": 56, "ahead": False}], ids=["", "chunks", "waiting"]
)
def test_taps_see_what_a_whole_text_would(name: str, keys: dict[str, Any]) -> None:
    model = MODELS[name]
    engine = Engine(model, EngineConfig(**{"slots": 4, "page": 4, "cache_tokens": 400, **keys}))
    engine.generate(TEXTS, Sampling(max_tokens=2, temperature=0))  # so that beginnings are known
    other = engine.add(TEXTS[3], Sampling(max_tokens=4, temperature=0))  # which asks for nothing
    done = engine.generate(TEXTS, Sampling(max_tokens=9, temperature=0), taps=NAMES)
    assert "cache_tokens" not in keys or engine.scheduler.preemptions
    for request in done:
        tokens = [*request.prompt, *request.outputs[:-1]]
        assert set(request.hidden) == set(NAMES)
        for tapped in NAMES:
            assert request.hidden[tapped].shape[0] == len(tokens)
            assert torch.allclose(request.hidden[tapped], whole(model, tokens, tapped), atol=2e-4)
    assert other.hidden == {}
    assert not any(module._forward_hooks for module in model.modules())


def test_taps_that_cannot_be_are_refused() -> None:
    engine = Engine(MODELS["attention"], EngineConfig(slots=2, page=4, cache_tokens=90))
    with pytest.raises(ConfigError, match=r"taps: the model has no module 'layer\.1'. Did you mean 'layers\.1'"):
        engine.add([1], Sampling(max_tokens=2), taps=["layers.0", "layer.1"])
    for nothing in ("head", "layers"):
        with pytest.raises(ConfigError, match=f"taps: '{nothing}' does not return a row for each token"):
            engine.generate([[1, 2]], Sampling(max_tokens=2), taps=[nothing])
    assert not engine.busy
    assert not any(module._forward_hooks for module in engine.model.modules())


@pytest.mark.parametrize("keys", [{}, {"budget": 7, "cache_tokens": 48}], ids=["", "chunks"])
def test_embeddings_are_pooled_hidden_states_of_transformers(keys: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save(MODELS["attention"], tmp_path)
    peer = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    engine = Engine(MODELS["attention"], EngineConfig(**{"slots": 4, "page": 4, "cache_tokens": 400, **keys}))
    engine.generate(TEXTS, Sampling(max_tokens=2, temperature=0))
    last, mean = engine.embed(TEXTS, "last"), engine.embed(TEXTS)
    for text, of_last, of_mean in zip(TEXTS, last, mean, strict=True):
        with torch.no_grad():
            x_SD = peer(torch.tensor([text])).last_hidden_state[0].double()
        for found, expected in ((of_last, x_SD[-1]), (of_mean, x_SD.mean(0))):
            assert torch.allclose(found.double(), expected / expected.norm(), atol=1e-4)
