"""`key=value` from the shell, before validation: values as YAML, list indices, globs, and keys that nobody wrote."""

import pytest
from config_zoo import RMS, Attention, Block, Convolution, Cycle, Recipe
from hypothesis import given
from hypothesis import strategies as st

from treadle.config import resolve
from treadle.config.overrides import parse
from treadle.errors import ConfigError

STACK = {
    "model": {"layers": ["block", {"kind": "block", "mixer": "convolution"}, {"kind": "block", "mixer": "attention"}]}
}


def apply(*overrides: str, raw: dict = STACK) -> Recipe:
    return resolve(Recipe, raw, overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        apply(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("{kind: x, y: [1]}", {"kind": "x", "y": [1]}),
        ("hello world", "hello world"),
        ("'3'", "3"),
        ('""', ""),
        ("a=b", "a=b"),
        ("Once: upon #a time", "Once: upon #a time"),
        ("- x", "- x"),
        ("@x", "@x"),
        ("no", "no"),
    ],
)
def test_value(text, value):
    assert parse(f"a.b={text}").value == value


@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=20))
def test_any_text_is_a_value_or_a_config_error(text):
    try:
        parse(f"a={text}")
    except ConfigError:
        assert text.lstrip()[:1] in ("[", "{", "'", '"')


def test_plain_paths():
    config = apply("seed=3", "model.dim=128", "model.layers.1.activation=gelu", "model.layers[-1].mixer.heads=4")
    assert (config.seed, config.model.dim) == (3, 128)
    assert config.model.layers == [
        Block(),
        Block(mixer=Convolution(), activation="gelu"),
        Block(mixer=Attention(heads=4)),
    ]


def test_the_source_is_left_alone():
    raw = {"model": {"layers": [{"kind": "block"}]}}
    apply("model.layers.0.mixer.heads=2", "seed=3", raw=raw)
    assert raw == {"model": {"layers": [{"kind": "block"}]}}


def test_a_bare_kind_opens():
    assert apply("model.layers.0.mixer.window=16").model.layers[0].mixer == Attention(window=16)
    assert apply("model.layers.1.mixer.width=2").model.layers[1].mixer == Convolution(width=2)


def test_unwritten_sections_start_from_their_default():
    assert apply("model.layers.0.mixer.window=16", raw={}).model.layers[0].mixer == Attention(window=16)


def test_a_section_that_is_off_starts_from_its_default():
    raw = {"model": {"layers": [{"kind": "block", "mixer": {"kind": "attention", "norm": None}}]}}
    assert apply("model.layers.0.mixer.norm.kind=rms", raw=raw).model.layers[0].mixer.norm == RMS()


def test_a_dictionary_takes_new_names():
    assert apply("sources.web.path=a", "sources.web.weight=2").sources["web"].weight == 2


def test_whole_values():
    config = apply(
        "model.layers.0={kind: block, mixer: convolution}", "betas=[0.5, 0.6]", "model.layers.2.mixer=convolution"
    )
    assert config.betas == (0.5, 0.6)
    assert [layer.mixer for layer in config.model.layers] == [Convolution()] * 3


def test_star_reaches_defaults_where_the_kind_has_the_key():
    layers = apply("model.layers.*.mixer.window=16").model.layers
    assert [layer.mixer for layer in layers] == [Attention(window=16), Convolution(), Attention(window=16)]


def test_double_star_reaches_any_depth():
    raw = {
        "model": {"layers": [{"kind": "cycle", "layers": [{"kind": "cycle", "layers": ["block"]}, "block"]}, "block"]}
    }
    biased = Block(mixer=Attention(bias=True))
    expected = [Cycle(layers=[Cycle(layers=[biased]), biased]), biased]
    assert apply("**.bias=true", raw=raw).model.layers == expected
    assert apply("model.**.mixer.bias=true", raw=raw).model.layers == expected


def test_a_glob_may_end_in_a_star():
    raw = {"sources": {"a": {"path": "x"}, "b": {"path": "y"}}}
    assert apply("sources.*.weight=2", raw=raw).sources["b"].weight == 2
    assert apply("prompts.*=x", raw={"prompts": ["a", "b"]}).prompts == ["x", "x"]


def test_globs_leave_a_section_that_is_off_alone():
    raw = {"model": {"layers": [{"kind": "block", "mixer": {"kind": "attention", "norm": None}}, "block"]}}
    layers = apply("**.norm.kind=rms", raw=raw).model.layers
    assert [layer.mixer.norm for layer in layers] == [None, RMS()]


def test_later_overrides_win():
    assert apply("**.heads=4", "model.layers.0.mixer.heads=2").model.layers[0].mixer.heads == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layrs.0.heads=4", "model.layrs: unknown key. Did you mean 'layers'?"),
        ("model.layers.0.mixer.hed=4", "model.layers[0].mixer.hed: unknown key. Did you mean 'heads'?"),
        ("model.layers.*.mixr.window=1", "override 'model.layers.*.mixr.window=1': matches nothing. "
         "Nearest: model.layers.*.mixer.window"),
        ("**.windo=1", "override '**.windo=1': matches nothing. Nearest: model.layers.*.mixer.window"),
        ("model.layers.9.x=1", "override 'model.layers.9.x=1': model.layers is a list of 3; has no index 9"),
        ("model.layers.first=1", "override 'model.layers.first=1': model.layers is a list of 3; "
         "expected an index or *, got 'first'"),
        ("seed.x=1", "override 'seed.x=1': seed is 0 and has no 'x' inside"),
        ("seed", "override 'seed': expected key=value, such as model.dim=512"),
        ("=3", "override '=3': expected key=value, such as model.dim=512"),
        ("model..dim=3", "override 'model..dim=3': expected key=value, such as model.dim=512"),
        ("model.**=3", "override 'model.**=3': `**` needs a key behind it, such as **.bias=true"),
    ],
)  # fmt: skip
def test_refusal(override, message):
    assert refusal(override) == message


def test_broken_yaml_names_the_override():
    assert refusal("betas=[1, 2").startswith("override 'betas=[1, 2':1: ")
