"""Positions in the stream and in attention: their formulas, what is refused, and what every way to run them shares."""

import math
from typing import Any

import pytest
import torch

from treadle.attention import AttentionContext
from treadle.config import Config, resolve, to_dict
from treadle.errors import ConfigError
from treadle.nn.absolute_position import LearnedConfig, SinusoidalConfig
from treadle.nn.position import RopeConfig
from treadle.nn.roles import parameter_roles
from treadle.nn.transformer import Transformer, TransformerConfig


class Whole(Config):
    model: TransformerConfig


def spec(absolute: Any = None, /, **mixer: Any) -> dict[str, Any]:
    layer = {
        "mixer": {"kind": "attention", "heads": 3, "head_dim": 16, **mixer},
        "feedforward": {"kind": "dense", "dim": 8},
    }
    return {
        "dim": 12,
        "vocab_size": 64,
        "max_length": 32,
        "position": absolute,
        "layers": [{"kind": "pre_norm", "repeat": 2, **layer}],
    }


def build(absolute: Any = None, /, **mixer: Any) -> Transformer:
    model: Transformer = resolve(TransformerConfig, spec(absolute, **mixer)).build()
    return model.initialise(0)


def test_sinusoids_are_their_formula() -> None:
    positions_BS = torch.tensor([[0, 1, 77], [5, 9000, 2]])
    got = SinusoidalConfig().build(6, 32)(positions_BS, torch.float64)
    for b in range(2):
        for s in range(3):
            for i in range(6):
                angle = int(positions_BS[b, s]) / 10000 ** (2 * (i // 2) / 6)
                assert got[b, s, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-12)


def test_learned_positions_are_rows_of_a_table() -> None:
    learned = LearnedConfig(offset=2).build(4, 8)
    torch.nn.init.normal_(learned.table.weight)
    assert learned.table.weight.shape == (10, 4)
    got = learned(torch.tensor([[3, 0, 7]]), torch.bfloat16)
    assert torch.equal(got, learned.table.weight[[5, 2, 9]][None].bfloat16())
    with pytest.raises(ConfigError, match=r"position 8 has no vector: the model's learned positions end at 7; use"):
        learned(torch.tensor([[3, 8]]), torch.float32)


def test_an_absolute_position_joins_the_embedding() -> None:
    model = build({"kind": "learned", "length": 20}, position=None)
    assert parameter_roles(model)["position.table.weight"] == "vocab"
    tokens_BS = torch.randint(0, 64, (1, 12))
    context = AttentionContext.packed(torch.tensor([[0] * 7 + [1] * 5]))
    whole = model(tokens_BS, context)
    torch.testing.assert_close(whole[:, 7:], model(tokens_BS[:, 7:]), rtol=0, atol=1e-5)
    with torch.no_grad():
        model.position.table.weight[3:] += 1
    changed = (model(tokens_BS, context) - whole).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [i not in (0, 1, 2, 7, 8, 9) for i in range(12)]


def test_without_positions_earlier_tokens_are_a_bag() -> None:
    tokens_BS = torch.tensor([[1, 2, 3, 4]])
    shuffled_BS = tokens_BS[:, [2, 0, 1, 3]]
    for position, same in ((None, True), ("alibi", False), ("rope", False)):
        source = spec(position=position)
        source["layers"][0]["repeat"] = 1  # a second layer could tell by what the first saw
        model = resolve(TransformerConfig, source).build().initialise(0)
        difference = (model(tokens_BS)[:, -1] - model(shuffled_BS)[:, -1]).abs().max()
        assert (difference < 1e-7) == same


def test_sinks_start_at_zero_and_take_a_share() -> None:
    plain, model = build(), build(sinks=True)
    assert parameter_roles(model)["layers.0.mixer.sinks"] == "column"
    assert model.layers["0"].mixer.sinks.tolist() == [0.0] * 3
    tokens_BS = torch.randint(0, 64, (1, 9))
    assert not torch.allclose(model(tokens_BS), plain(tokens_BS), atol=1e-6)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.mixer.sinks.fill_(-1e4)  # takes nothing
    torch.testing.assert_close(model(tokens_BS), plain(tokens_BS))


KINDS: list[dict[str, Any]] = [
    {"position": "alibi"},
    {"position": "alibi", "sinks": True, "window": 5},
    {"position": {"kind": "rope", "partial": 0.25, "layout": "interleaved"}},
    {"position": {"kind": "rope", "scaling": {"kind": "dynamic_ntk", "factor": 2.0, "original_length": 8}}},
    {"position": {"kind": "rope", "scaling": {"kind": "yarn", "original_length": 8}}, "sinks": True},
]


@pytest.mark.parametrize("mixer", KINDS)
@pytest.mark.parametrize("position", [None, "sinusoidal", "learned"])
def test_layers_compile_without_a_break(mixer: dict[str, Any], position: str | None) -> None:
    model, tokens_BS = build(position, **mixer), torch.randint(0, 64, (2, 20))
    context = AttentionContext.packed(torch.tensor([[0] * 12 + [1] * 8, [0] * 20]))
    expected = model(tokens_BS, context)
    for layer in model.layers.values():
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(tokens_BS, context), expected)


def test_layers_of_one_kind_share_a_table() -> None:
    other = {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}
    layers = [*spec()["layers"], *spec(position=other)["layers"]]
    model = resolve(TransformerConfig, {**spec(), "layers": layers}).build()
    context = model.with_tables(AttentionContext.causal(1, 4))
    assert len(context.tables) == 2


@pytest.mark.parametrize(
    ("position", "key", "message"),
    [
        ({"partial": 0.2}, "position.partial", "0.2 of head dim 16 is 3 channels; choose an even"),
        ({"partial": 0.01}, "position.partial", "0.01 of head dim 16 is 0 channels"),
        ({"partial": 1.5}, "position.partial", "float > 0, <= 1"),
        ({"layout": "halves"}, "position.layout", "half"),
        ({"scaling": "yarm"}, "position.scaling", "Did you mean 'yarn'"),
        ({"scaling": {"kind": "llama3", "low_freq_factor": 5}}, "position.scaling.low_freq_factor", "5.0 must be less"),
        (
            {"scaling": {"kind": "longrope", "original_length": 8, "short_factor": [1] * 8, "long_factor": [1] * 6}},
            "position.scaling.long_factor",
            "has 6 numbers; 16 rotated channels have 8 frequencies",
        ),
        ({"partial": 0.125, "scaling": {"kind": "dynamic_ntk", "factor": 2}}, "position.scaling", "at least 4 rotated"),
    ],
)
def test_impossible_rotations_are_explained(position: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Whole, {"model": spec(position={"kind": "rope", **position})})
    assert f"model.layers[0].mixer.{key}" in str(caught.value)
    assert message in str(caught.value)


def test_head_sizes_are_checked_where_they_matter() -> None:
    with pytest.raises(ConfigError, match=r"mixer.head_dim: 5 is odd; rotary positions pair channels"):
        resolve(Whole, {"model": spec(head_dim=5)})
    for position in (None, "alibi"):
        resolve(Whole, {"model": spec(head_dim=5, position=position)})
    with pytest.raises(ConfigError, match=r"model.position.*dim=13 is odd"):
        resolve(Whole, {"model": {**spec("sinusoidal"), "dim": 13}})


def test_a_scaled_rotation_survives_yaml() -> None:
    scaling = {"kind": "longrope", "original_length": 8, "short_factor": [1.5] * 8, "long_factor": [2.5] * 8}
    config = resolve(TransformerConfig, spec("learned", position={"kind": "rope", "scaling": scaling}, sinks=True))
    assert resolve(TransformerConfig, to_dict(config)) == config
    assert isinstance(config.layers[0].mixer.position, RopeConfig)  # type: ignore[attr-defined]
