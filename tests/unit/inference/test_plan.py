"""`treadle plan --serve`: against the tensors that the engine makes, and speeds by hand."""

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from treadle import cli
from treadle.config import read_yaml, resolve
from treadle.errors import ConfigError
from treadle.inference.engine import WORKSPACE, Engine, EngineConfig, page_counts
from treadle.inference.plan import plan_serving
from treadle.memory.devices import DEVICES
from treadle.nn.flops import cache_elements
from treadle.nn.store import build_meta
from treadle.nn.transformer import TransformerConfig

FULL: dict[str, Any] = {"kind": "attention", "heads": 4, "kv_heads": 2}
MIXERS: list[dict[str, Any]] = [FULL, {**FULL, "window": 64}, {"kind": "gated_delta", "heads": 4, "head_dim": 16}]


def spec(*mixers: dict[str, Any], **changes: Any) -> TransformerConfig:
    layers = [{"kind": "pre_norm", "mixer": m, "feedforward": {"kind": "gated", "dim": 128}} for m in mixers]
    source = {"dim": 64, "vocab_size": 256, "max_length": 512, "layers": layers, **changes}
    found: TransformerConfig = resolve(TransformerConfig, source)
    return found


@pytest.mark.parametrize("mixers", [MIXERS[:1], MIXERS[:2], MIXERS[1:], MIXERS], ids=len)
def test_the_cache_is_what_the_engine_allocates(mixers):
    config = EngineConfig(slots=8, page=16, cache_tokens=2048)
    found = plan_serving(spec(*mixers), DEVICES["h200"], config, length=256)
    model = spec(*mixers).build().to(torch.bfloat16)
    model.dtype = torch.bfloat16
    storage = Engine(model, config).runner.storage
    tensors = [t for store in storage.layers.values() for t in vars(store).values()]
    held = [t for each in tensors for t in (each if isinstance(each, list | tuple) else [each])]
    bytes_of = sum(t.nbytes for t in held if isinstance(t, torch.Tensor))
    # Of a state the engine counts each number as float32; the inputs of its convolution are less.
    assert found.cache == pytest.approx(bytes_of, rel=0.04 if MIXERS[2] in mixers else 0)
    assert found.cache >= bytes_of
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.requests == 8
    # Without a layer that sees everything, requests hold the pages that their window reaches.
    if mixers == MIXERS[:1]:
        assert plan_serving(spec(*mixers), DEVICES["h200"], config, length=512).requests == 4


def test_the_engine_and_the_plan_find_as_many_tokens():
    model = build_meta(spec(*MIXERS[:2]))
    model.dtype = torch.bfloat16
    free, total = 100e9, 150e9
    config = EngineConfig(slots=1 << 20)
    (full, window) = page_counts(model, config, (free, total))
    assert full == window == -(-((free - 0.1 * total - WORKSPACE) // (2 * cache_elements(model))) // config.page)


def test_speeds_of_qwen3_by_hand():
    """Decoding reads 2 bytes of each of 595,984,384 weights, and 114,688 of each token; tied, so the table is read."""
    qwen: TransformerConfig = resolve(TransformerConfig, read_yaml("recipes/models/qwen3-0.6b.yaml"))
    found = plan_serving(qwen, DEVICES["h200"], length=4096)
    bandwidth = DEVICES["h200"].bandwidth_tbs * 1e12
    weights, each = 2 * 596_049_920, 114_688 * 4096
    assert found.alone == pytest.approx(bandwidth / (weights + each), rel=1e-3)
    busy = max(weights / bandwidth, 256 * weights / (DEVICES["h200"].matmul_tflops * 1e12))
    assert found.together == pytest.approx(256 / (busy + 256 * each / bandwidth), rel=1e-3)
    assert found.requests == 256


def test_of_experts_those_are_read_that_somebody_chose():
    moe = {"kind": "moe", "experts": 8, "top_k": 2, "dim": 64}
    layer = {"kind": "pre_norm", "mixer": FULL, "feedforward": moe}
    found = plan_serving(spec(layers=[layer]), DEVICES["h200"], EngineConfig(slots=4, cache_tokens=256), length=1)
    experts = 8 * 3 * 64 * 64
    others = sum(p.numel() for p in spec(layers=[layer]).build().parameters()) - experts - 256 * 64
    cache = 2 * 2 * 2 * 16
    seconds = (2 * (others + experts * 2 / 8) + cache) / (DEVICES["h200"].bandwidth_tbs * 1e12)
    assert 1 / found.alone == pytest.approx(seconds, rel=1e-6)
    chosen = experts * (1 - 0.75**4)
    seconds = (2 * (others + chosen) + 4 * cache) / (DEVICES["h200"].bandwidth_tbs * 1e12)
    assert 4 / found.together == pytest.approx(seconds, rel=1e-6)


def test_what_does_not_fit_says_so():
    large: TransformerConfig = resolve(TransformerConfig, read_yaml("recipes/models/llama-3-70b.yaml"))
    with pytest.raises(ConfigError, match=r"weights take 131\.4 GiB in bf16.*larger device"):
        plan_serving(large, DEVICES["h100"])
    with pytest.raises(ConfigError, match=r"less than one request"):
        plan_serving(spec(FULL, max_length=1 << 30), DEVICES["h100"])


def test_from_the_command_line():
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, ["plan", "recipes/models/qwen3-0.6b.yaml", *arguments])
        assert result.exit_code == code, result.output
        return result.output

    shown = run("--serve", "--device", "h100", "--length", "2048", "slots=32")
    assert "32 requests of 2,048 tokens" in shown
    assert json.loads(run("--serve", "--json"))["length"] == 40960
    assert "--serve" in run("--length", "2048", code=2)
