"""Blocks against their formulas, and the properties that every block owes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from treadle.attention import AttentionContext
from treadle.config import Config, resolve
from treadle.errors import ConfigError
from treadle.nn import flops
from treadle.nn.config import FeedForwardConfig, MixerConfig, NormConfig
from treadle.nn.init import fill_normal
from treadle.nn.position import RopeConfig
from treadle.nn.roles import parameter_roles
from treadle.nn.store import build_meta, load_model, save_model
from treadle.nn.transformer import TransformerConfig


class Part(Config):
    mixer: MixerConfig | None = None
    feedforward: FeedForwardConfig | None = None
    norm: NormConfig | None = None


def spec(**changes: Any) -> dict[str, Any]:
    layer = {
        "kind": "pre_norm",
        "mixer": {"kind": "attention", "heads": 4},
        "feedforward": {"kind": "gated", "dim": 24},
    }
    return {"dim": 16, "vocab_size": 64, "max_length": 32, "layers": [{**layer, "repeat": 2}], **changes}


ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_feedforwards_are_their_formulas(name: str, bias: bool) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for kind in ("dense", "gated"):
        config = resolve(Part, {"feedforward": {"kind": kind, "dim": 12, "activation": name, "bias": bias}}).feedforward
        block = config.build(8).double()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
        weights = dict(block.named_parameters())
        down = weights["down.weight"], weights.get("down.bias")
        first = "gate_up" if kind == "gated" else "up"
        hidden = F.linear(x, weights[f"{first}.weight"], weights.get(f"{first}.bias"))
        act = ACTIVATIONS[name]
        hidden = act(hidden[..., :12]) * hidden[..., 12:] if kind == "gated" else act(hidden)
        torch.testing.assert_close(block(x), F.linear(hidden, *down))


def test_norms_are_their_formulas() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    rms = resolve(Part, {"norm": {"kind": "rms", "eps": 1e-3}}).norm.build(8).double()
    torch.nn.init.normal_(rms.weight)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * rms.weight)
    layer = resolve(Part, {"norm": "layer"}).norm.build(8).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), scaled * layer.weight + layer.bias)


def test_rope_turns_pairs_as_complex_numbers() -> None:
    rope = RopeConfig(theta=100.0).build(8, 64)
    q = torch.randn(1, 5, 2, 8)
    positions = torch.tensor([[3, 0, 60, 7, 1]])
    rotated, _ = rope(q, q, AttentionContext(positions))
    pairs = torch.complex(q[..., :4], q[..., 4:])
    angle = positions[..., None] * 100.0 ** -(torch.arange(4) / 4)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), dim=-1))


def test_rope_depends_on_distance_only_even_far_out() -> None:
    rope = RopeConfig(theta=1e6).build(64, 1 << 20)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(i: int, j: int) -> float:
        a, _ = rope(q, k, AttentionContext(torch.tensor([[i]])))
        _, b = rope(q, k, AttentionContext(torch.tensor([[j]])))
        return float((a * b).sum())

    assert score(1_000_007, 1_000_000) == pytest.approx(score(7, 0), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, r"model.layers\[0\].mixer.kv_heads.*3 does not divide heads=4; try 1, 2, 4"),
        ({"heads": 5}, r"model.layers\[0\].mixer.heads.*5 does not divide the model's dim=16"),
        ({"heads": 16}, r"model.layers\[0\].mixer.heads.*odd"),
        ({"haeds": 4}, r"model.layers\[0\].mixer.haeds: unknown key. Did you mean 'heads'"),
        ({"kind": "atention"}, r"model.layers\[0\].mixer.*'atention'.*'attention'"),
        ({"qk_norm": "rmsnorm"}, r"model.layers\[0\].mixer.qk_norm.*unknown kind"),
    ],
)
def test_impossible_models_are_explained(change: dict[str, Any], message: str) -> None:
    class Whole(Config):
        model: TransformerConfig

    source = spec()
    source["layers"][0]["mixer"].update(change)
    with pytest.raises(ConfigError, match=message):
        resolve(Whole, {"model": source})


def test_patterns_unroll_in_order() -> None:
    local = {
        "kind": "pre_norm",
        "mixer": {"kind": "attention", "heads": 4, "window": 8},
        "feedforward": {"kind": "dense", "dim": 8},
    }
    whole = {**local, "mixer": {"kind": "attention", "heads": 4}}
    layers = [{"kind": "cycle", "repeat": 2, "layers": [{**local, "repeat": 2}, whole]}, local]
    config = resolve(TransformerConfig, spec(layers=layers))
    windows = [layer.mixer.facts.window for layer in config.build().layers.values()]
    assert windows == [8, 8, None, 8, 8, None, 8]


def test_weights_follow_from_seed_and_name_alone() -> None:
    small = resolve(TransformerConfig, spec()).build().initialise(7)
    again = resolve(TransformerConfig, spec()).build().initialise(7)
    tied = resolve(TransformerConfig, spec(tied=True)).build().initialise(7)
    other = resolve(TransformerConfig, spec()).build().initialise(8)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        if parameter.ndim == 2:
            assert not torch.equal(parameter, dict(other.named_parameters())[name])
    assert torch.equal(small.embedding.weight, tied.embedding.weight)


def test_a_tied_model_stays_tied_when_it_leaves_the_meta_device(tmp_path: Path) -> None:
    model = build_meta(resolve(TransformerConfig, spec(tied=True))).to_empty(device="cpu").initialise(0)
    assert model.head.weight is model.embedding.weight
    loaded = load_model(save_model(model, tmp_path))
    assert loaded.head.weight is loaded.embedding.weight
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens), model(tokens))


def test_stacked_projections_start_as_if_apart() -> None:
    model = resolve(TransformerConfig, spec()).build().initialise(3)
    query = torch.empty(16, 16)
    fill_normal(query, 0.02, seed=3, name="layers.0.mixer.qkv.q.weight")
    assert torch.equal(model.layers["0"].mixer.qkv.weight[:16], query)


def test_initial_values_are_normal_numbers() -> None:
    values = torch.empty(1 << 20)
    fill_normal(values, 2.0, seed=0, name="x")
    standard = (values / 2).double().sort().values
    assert abs(standard.mean()) < 4e-3
    assert abs(standard.std() - 1) < 4e-3
    # Kolmogorov-Smirnov distance to the normal distribution; 1.63/sqrt(n) is its 1% critical value.
    cumulative = 0.5 * (1 + torch.erf(standard / math.sqrt(2)))
    distance = (cumulative - (torch.arange(1 << 20) + 0.5) / (1 << 20)).abs().max()
    assert distance < 1.63 / math.sqrt(1 << 20)
    assert abs((values[1:] * values[:-1]).mean() / 4) < 4e-3


def test_every_parameter_has_a_role() -> None:
    model = resolve(TransformerConfig, spec()).build()
    roles = parameter_roles(model)
    assert roles["layers.0.mixer.qkv.weight"] == "column"
    assert roles["layers.0.mixer.out.weight"] == "row"
    assert roles["embedding.weight"] == roles["head.weight"] == "vocab"
    assert roles["norm.weight"] == "norm"
    model.layers["0"].extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"layers.0.extra has no role"):
        parameter_roles(model)


def test_facts_by_hand() -> None:
    model = resolve(TransformerConfig, spec()).build()
    matrices = 2 * (16 * 48 + 16 * 16 + 16 * 48 + 24 * 16)
    assert flops.parameter_count(model) == matrices + 2 * 64 * 16 + 5 * 16
    assert flops.forward_flops(model, 32) == 2 * (matrices + 64 * 16) + 2 * 4 * 16 * 16
    assert flops.training_flops(model, 32) == 3 * flops.forward_flops(model, 32)
    assert flops.cache_elements(model) == 2 * 2 * 16


def test_bf16_computes_with_fp32_weights() -> None:
    model = resolve(TransformerConfig, spec()).build().initialise(0)
    tokens = torch.randint(0, 64, (2, 9))
    exact = model(tokens)
    model.dtype = torch.bfloat16
    rounded = model(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 2e-2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_users_own_block_needs_one_file(tmp_path: Path) -> None:
    (tmp_path / "my_block.py").write_text(OWN_BLOCK)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "imports: [my_block.py]\ndim: 16\nvocab_size: 64\nmax_length: 32\nlayers:\n"
        "  - {kind: pre_norm, mixer: {kind: attention, heads: 4}, feedforward: {kind: squared, dim: 8}}\n"
    )
    model = resolve(TransformerConfig, recipe).build().initialise(0)
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 64)
    assert parameter_roles(model)["layers.0.feedforward.down.weight"] == "row"


OWN_BLOCK = """
from typing import Literal
from torch import Tensor, nn
from treadle.nn.config import FeedForwardConfig
from treadle.nn.linear import Linear

class SquaredConfig(FeedForwardConfig):
    kind: Literal["squared"] = "squared"
    dim: int

class Squared(nn.Module):
    roles = {"up": "column", "down": "row"}

    def __init__(self, config: SquaredConfig, model_dim: int):
        super().__init__()
        self.up, self.down = Linear(model_dim, config.dim), Linear(config.dim, model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).square())
"""
