"""What a wrong value is answered with: the key, what was expected, what was found, the fix."""

from typing import Literal

import pytest
from config_zoo import Mixer, Recipe
from pydantic import ValidationError

from treadle.config import Kind, resolve
from treadle.errors import ConfigError


def complaint(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(Recipe, raw)
    return str(caught.value)


def layer(**keys: object) -> dict:
    return {"model": {"layers": ["block", {"kind": "block", **keys}]}}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"sed": 1}, "sed: unknown key. Did you mean 'seed'?"),
        (
            layer(mixer={"kind": "attention", "head": 4}),
            "model.layers[1].mixer.head: unknown key. Did you mean 'heads'?",
        ),
        (
            layer(mixer={"kind": "convolution", "zzz": 4}),
            "model.layers[1].mixer.zzz: unknown key. Known: bias, kind, width.",
        ),
        (layer(mixer="atention"), "model.layers[1].mixer: unknown kind 'atention'. Did you mean 'attention'?"),
        (layer(mixer={"heads": 2}), "model.layers[1].mixer: needs a `kind`, one of: attention, convolution"),
        (layer(mixer={"kind": ["a"]}), "model.layers[1].mixer: unknown kind '['a']'. Known: attention, convolution."),
        (
            layer(mixer={"kind": "attention", "heads": "x"}),
            "model.layers[1].mixer.heads: expected int > 0, got 'x'",
        ),
        (
            layer(mixer={"kind": "attention", "heads": 0}),
            "model.layers[1].mixer.heads: expected int > 0, got 0",
        ),
        (
            layer(mixer={"kind": "attention", "window": -1}),
            "model.layers[1].mixer.window: expected int > 0 | null, got -1",
        ),
        (
            layer(activation="silo"),
            "model.layers[1].activation: expected silu | gelu, got 'silo'. Did you mean 'silu'?",
        ),
        (layer(mixer=None), None),
        (
            layer(mixer={"kind": "attention", "kv_heads": 3}),
            "model.layers[1].mixer.kv_heads: 3 does not divide heads=8; try 1, 2, 4, 8",
        ),
        ({"model": {"layers": [{"kind": "cycle"}]}}, None),
        ({"seed": 1.5}, "seed: expected int, got 1.5"),
        ({"seed": None}, "seed: expected int, got null; leave the key out for its default"),
        ({"rate": 2}, "rate: expected float > 0, < 1, got 2"),
        ({"name": 12}, "name: expected text, got 12; quote it: '12'"),
        ({"steps": "many"}, "steps: expected int | auto, got 'many'"),
        ({"betas": [0.9]}, None),
        ({"prompts": "hello"}, "prompts: expected list[text], got 'hello'"),
        ({"model": {"layers": []}}, "model.layers: expected list[block | cycle] length >= 1, got []"),
        ({"model": 3}, "model: expected mapping, got 3"),
        ({"sources": {"web": {"weight": 2}}}, "sources.web.path: missing; needs path"),
        ({"sources": {"web": {"path": "a", "weight": 0}}}, "sources.web.weight: expected float > 0, got 0"),
        ({"data": {"path": "a", "wieght": 2}}, "data.wieght: unknown key. Did you mean 'weight'?"),
        ({"data": [{"path": "a"}, {"path": 3}]}, "data[1].path: expected path, got 3"),
        ({1: 2}, None),
    ],
)
def test_message(raw, message):
    text = complaint(raw)
    assert "pydantic" not in text
    assert "Input should" not in text
    if message is not None:
        assert text == message


def test_every_problem_is_listed_once():
    raw = layer(mixer={"kind": "attention", "kv_heads": 3})
    raw["model"]["layers"][0] = {"kind": "block", "mixer": {"kind": "attention", "kv_heads": 5, "bias": "x"}}
    raw["model"]["layers"].append({"kind": "block", "mixer": {"kind": "attention", "kv_heads": 7}})
    assert complaint({**raw, "seed": "x", "steps": "y", "sed": 1}).splitlines() == [
        "6 problems",
        "  seed: expected int, got 'x'",
        "  steps: expected int | auto, got 'y'",
        "  model.layers[0].mixer.bias: expected bool, got 'x'",
        "  model.layers[1].mixer.kv_heads: 3 does not divide heads=8; try 1, 2, 4, 8",
        "  model.layers[2].mixer.kv_heads: 7 does not divide heads=8; try 1, 2, 4, 8",
        "  sed: unknown key. Did you mean 'seed'?",
    ]


def test_key_errors_names_places_below():
    wrong = {"kind": "block", "mixer": {"kind": "attention", "heads": 3}}
    assert complaint({"model": {"layers": [wrong, "block", wrong]}}).splitlines()[1:] == [
        "  model.layers[0].mixer.heads: 3 does not divide dim=64",
        "  model.layers[2].mixer.heads: 3 does not divide dim=64",
    ]


def test_the_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: x\n")
    with pytest.raises(ConfigError) as caught:
        resolve(Recipe, path)
    assert str(caught.value) == f"{path}: seed: expected int, got 'x'"


def test_long_values_are_cut():
    assert len(complaint({"seed": "x" * 1000})) < 120


def test_python_construction_raises_at_the_same_key():
    with pytest.raises(ValidationError) as caught:
        Mixer.kinds()["attention"](heads=8, kv_heads=3)
    assert caught.value.errors()[0]["loc"] == ("kv_heads",)


def test_a_field_takes_only_the_kinds_below_its_class():
    class Part(Kind):
        pass

    class Narrow(Part):
        pass

    class A(Part):
        kind: Literal["a"] = "a"

    class B(Narrow):
        kind: Literal["b"] = "b"

    assert set(Part.kinds()) == {"a", "b"}
    assert set(Narrow.kinds()) == {"b"}
    assert Part.model_validate("a") == A()
    with pytest.raises(ValidationError, match="unknown kind 'a'"):
        Narrow.model_validate("a")
