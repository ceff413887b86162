"""Weights of 8 bits: their error against the format's, products against PyTorch's own, and engines that hold them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import MODELS, alone

import treadle
from treadle.cli.serve import make_engine
from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.errors import ConfigError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.quantised import QuantisedLinear, product, quantise
from treadle.inference.request import Sampling
from treadle.kernels.quantise import quantise_rows
from treadle.nn.store import save_model
from treadle.nn.transformer import Transformer

GATED = {"kind": "gated", "dim": 64}
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"kind": "attention", "heads": 4, "kv_heads": 2},
    "latent": {"kind": "latent_attention", "heads": 2, "kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "value_dim": 16},
}


def small(name: str) -> Transformer:
    layers = [{"kind": "pre_norm", "repeat": 2, "mixer": MIXERS[name], "feedforward": GATED}]
    model = treadle.build({"dim": 32, "vocab_size": 320, "max_length": 64, "layers": layers}, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


def test_a_product_is_that_of_rounded_numbers() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), torch.randn(48, 64) * torch.logspace(-3, 3, 48)[:, None]
    (x8, x_scale), (weight8, weight_scale) = quantise_rows(x), quantise_rows(weight)
    for exact, held, scale in ((x, x8, x_scale), (weight, weight8, weight_scale)):
        error = (held.double() * scale.double()[:, None] - exact.double()).abs()
        # Three bits after the leading one; below 2^-6 the numbers of e4m3 are 2^-9 apart.
        bound = torch.maximum(exact.abs() / 16, scale[:, None] * 2**-10)
        assert (error <= bound * (1 + 1e-5)).all()
    found = product(x8, x_scale, weight8, weight_scale, torch.float32)
    expected = (x8.double() * x_scale.double()[:, None]) @ (weight8.double() * weight_scale.double()[:, None]).t()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
    if torch.__version__ >= "2.12":  # before, PyTorch has no scales for rows on a CPU
        scales: Any = {"scale_a": x_scale[:, None], "scale_b": weight_scale[None]}
        theirs = torch._scaled_mm(x8, weight8.t(), out_dtype=torch.float32, **scales)  # as on a GPU
        assert torch.allclose(theirs, found, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_an_engine_with_weights_of_8_bits_is_near_the_model(name: str) -> None:
    model, exact = small(name), small(name)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    layers = quantise(model)
    held = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    assert len(held) == layers >= 6
    assert all(module.weight.dtype == torch.float8_e4m3fn for module in held)
    saved = sum(3 * module.weight.numel() for module in held)  # of float32
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == before - saved
    if name == "latent":  # its weight is used by itself
        assert not any(path.endswith("kv_up") and module in held for path, module in model.named_modules())
    engine = Engine(model, EngineConfig(slots=4, page=4, cache_tokens=200))
    prompts = [list(range(k, k + 12)) for k in range(4)]
    done = engine.generate(prompts, Sampling(max_tokens=8, temperature=0, logprobs=0))
    for request in done:
        with torch.no_grad():
            scores = exact(torch.tensor([[*request.prompt, *request.outputs]]))[0].log_softmax(-1)
        expected = [scores[11 + i, token].item() for i, token in enumerate(request.outputs)]
        assert [each.logprob for each in request.logprobs] == pytest.approx(expected, abs=0.25)
        assert request.outputs == alone(model, request.prompt, 8)


def test_other_weights_are_quantised_in_place() -> None:
    model, other = small("attention"), small("attention")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    quantise(model)
    engine = Engine(model, EngineConfig(slots=2, page=4, cache_tokens=90))
    places = [p.data_ptr() for p in model.parameters()]
    engine.update_weights(dict(other.named_parameters()))
    assert [p.data_ptr() for p in model.parameters()] == places
    quantise(other)
    (done,) = engine.generate([[1, 2, 3]], Sampling(max_tokens=10, temperature=0))
    assert done.outputs == alone(other, [1, 2, 3], 10)


def test_what_cannot_be_quantised_says_so(tmp_path: Path) -> None:
    odd = treadle.build(
        {
            "dim": 24,
            "vocab_size": 64,
            "max_length": 8,
            "layers": [{"kind": "pre_norm", "mixer": {"kind": "attention", "heads": 3}, "feedforward": GATED}],
        }
    )
    with pytest.raises(ConfigError, match="multiples of 16"):
        quantise(odd)
    save_model(small("attention"), tmp_path)
    BytesTokenizerConfig().build().save(tmp_path / "tokenizer")
    engine = make_engine(tmp_path, EngineConfig(cache_tokens=90), "cpu", "auto", [], quantise="fp8")
    assert any(isinstance(module, QuantisedLinear) for module in engine.model.modules())
    plain = make_engine(tmp_path, EngineConfig(cache_tokens=90), "cpu", "auto", [])
    assert not any(isinstance(module, QuantisedLinear) for module in plain.model.modules())
    assert not any(isinstance(module, QuantisedLinear) for module in MODELS["attention"].modules())
