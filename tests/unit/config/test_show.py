"""Configurations out and back in: the same configuration, the same text."""

import pytest
import yaml
from config_zoo import RMS, Attention, Block, Convolution, Cycle, Model, Recipe, Source
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.config import diff, keys, resolve, to_dict, to_yaml
from treadle.config.show import ABSENT
from treadle.config.yaml_io import dump, parse

LOOKALIKES = "3e-4 1_000 no null ~ true 0x1f 1:30 2026-01-31 << = # % --- - ? @a &a *a !a".split()  # noqa: SIM905
PHRASES = ["", " ", "a: b", "- a", "a # b", "\x85", "a\u2028b", "\ufeff", "a\tb", "\x00", "a\r\nb"]
MULTILINE = ["a\nb", "a\n", "\na", " a\n  b\n", "a \nb", "\ta\nb", "a\n\n\nb\n\n", "\n", "---\na", "...\n"]
odd_texts = st.sampled_from(LOOKALIKES + PHRASES + MULTILINE)
texts = odd_texts | st.text(st.characters(blacklist_categories=("Cs",)), max_size=30)
floats = st.floats(allow_nan=False)
attention = st.builds(
    Attention,
    heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 10**12),
    norm=st.none() | st.just(RMS()),
    bias=st.booleans(),
)
blocks = st.builds(
    Block,
    mixer=attention | st.builds(Convolution, width=st.integers(1, 9)),
    activation=st.sampled_from(["silu", "gelu"]),
)
layers = st.recursive(blocks, lambda inner: st.builds(Cycle, layers=st.lists(inner, max_size=3)), max_leaves=5)
sources = st.builds(Source, path=st.just("a/b.txt"), weight=st.floats(min_value=1e-300, allow_infinity=False))
recipes = st.builds(
    Recipe,
    name=texts,
    seed=st.integers(),
    rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
    steps=st.just("auto") | st.integers(),
    betas=st.tuples(floats, floats),
    prompts=st.lists(texts, max_size=4),
    model=st.builds(Model, layers=st.lists(layers, min_size=1, max_size=3)),
    sources=st.dictionaries(texts, sources, max_size=2),
    data=st.none() | sources | st.lists(sources, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(recipes)
def test_round_trip(config):
    assert resolve(Recipe, to_dict(config)) == config
    text = to_yaml(config)
    again = resolve(Recipe, parse(text, "text"))
    assert again == config
    assert to_yaml(again) == text


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_dumped_text_means_the_same_to_us_and_to_any_other_yaml_reader(data):
    text = dump(data)
    assert parse(text, "text") == data
    assert yaml.safe_load(text) == data


def test_yaml_is_readable():
    config = Recipe(rate=3e-5, prompts=["one\ntwo", "three"], model=Model(layers=[Block(mixer=Convolution())]))
    assert (
        to_yaml(config)
        == """\
imports: []
name: run
seed: 0
rate: 3.0e-5
steps: auto
betas: [0.9, 0.95]
prompts:
  - |-
    one
    two
  - three
model:
  dim: 64
  layers:
    - kind: block
      mixer:
        kind: convolution
        bias: false
        width: 4
      activation: silu
sources: {}
data: null
"""
    )


def test_every_key_is_listed():
    listed = {key.key: key for key in keys(Recipe)}
    assert listed["rate"][1:] == ("float > 0, < 1", "0.5", "")
    assert listed["steps"].type == "int | auto"
    assert listed["betas"].type == "list[float, float]"
    assert listed["model"].type == "mapping"
    assert listed["model.layers"].type == "list[block | cycle] length >= 1"
    assert listed["model.layers[](block).mixer"][1:3] == ("attention | convolution", "attention")
    assert listed["model.layers[](block).mixer(attention)"].description == "Attention."
    assert listed["model.layers[](block).mixer(attention).heads"][1:] == ("int > 0", "8", "query heads")
    assert listed["model.layers[](block).mixer(attention).window"][1:3] == ("int > 0 | null", "null")
    assert listed["model.layers[](cycle).layers"].type == "list[block | cycle]"
    assert listed["sources{}.path"][1:3] == ("path", "required")
    assert "data.weight" in listed
    assert "data[].weight" in listed
    assert not any(key.startswith("model.layers[](cycle).layers[](") for key in listed)  # a family is entered once
    assert len(listed) == len(keys(Recipe))


def test_a_string_below_a_field_is_its_description():
    from config_documented import Documented

    assert keys(Documented)[0].description == "How many times."


def test_diff():
    a = Recipe(model=Model(layers=[Block(), Block(mixer=Convolution())]))
    b = resolve(Recipe, to_dict(a), ["model.layers.1.mixer=attention", "betas=[0.9, 0.99]", "sources.web.path=x"])
    assert diff(a, a) == []
    assert diff(a, to_dict(a)) == []
    changed = {key: (x, y) for key, x, y in diff(a, b)}
    assert changed["betas"] == ([0.9, 0.95], [0.9, 0.99])
    assert changed["model.layers[1].mixer.kind"] == ("convolution", "attention")
    assert changed["model.layers[1].mixer.width"] == (4, ABSENT)
    assert changed["model.layers[1].mixer.heads"] == (ABSENT, 8)
    assert changed["sources.web.path"] == (ABSENT, "x")
    assert not any(key.startswith("model.layers[0]") for key in changed)


@pytest.mark.parametrize(("a", "b", "count"), [({"x": 1}, {"x": True}, 1), ({"x": 1}, {"x": 1}, 0), ({"x": {}}, {}, 1)])
def test_diff_of_plain_data(a, b, count):
    assert len(diff(a, b)) == count
