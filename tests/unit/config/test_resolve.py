"""From recipe files to a configuration: includes, presets, the user's modules, in the order that is promised."""

import sys
from pathlib import Path

import pytest
from config_zoo import Attention, Block, Convolution, Mixer, Recipe

from treadle.config import read_yaml, resolve, to_dict, to_yaml
from treadle.errors import ConfigError


@pytest.fixture(autouse=True)
def own_kinds(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(Mixer, "_family", dict(Mixer._family))


@pytest.fixture
def write(tmp_path: Path):
    def _write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def test_plain_words(write):
    path = write(
        "a.yaml", "a: 3e-4\nb: 1_000\nc: no\nd: 1:30\ne: 2026-01-31\nf: TRUE\ng: ~\nh: .inf\ni: 010\nj: 0x1f\n"
    )
    assert read_yaml(path) == {
        "a": 3e-4, "b": 1000, "c": "no", "d": "1:30", "e": "2026-01-31", "f": True, "g": None, "h": float("inf"),
        "i": 10, "j": 31,
    }  # fmt: skip


def test_kind_by_name_and_by_mapping():
    config = resolve(Recipe, {"model": {"layers": [{"kind": "block", "mixer": "convolution"}, "block"]}})
    assert config.model.layers == [Block(mixer=Convolution()), Block()]


def test_include_merges_and_the_including_file_wins(write):
    write("base/model.yaml", "dim: 128\nlayers: [block, block]\n")
    write("base/base.yaml", "seed: 1\nname: base\nmodel:\n  include: model.yaml\n  dim: 256\n")
    path = write("run.yaml", "include: base/base.yaml\nname: mine\n")
    config = resolve(Recipe, path)
    assert (config.seed, config.name, config.model.dim, len(config.model.layers)) == (1, "mine", 256, 2)


def test_later_include_wins_and_lists_are_replaced(write):
    write("a.yaml", "seed: 1\nprompts: [x, y]\nname: a\n")
    write("b.yaml", "seed: 2\nprompts: [z]\n")
    data = read_yaml(write("run.yaml", "include: [a.yaml, b.yaml]\n"))
    assert data == {"seed": 2, "prompts": ["z"], "name": "a"}


def test_include_inside_a_list_item(write):
    write("block.yaml", "kind: block\nmixer: convolution\n")
    path = write("run.yaml", "model:\n  layers:\n    - include: block.yaml\n      activation: gelu\n")
    assert resolve(Recipe, path).model.layers == [Block(mixer=Convolution(), activation="gelu")]


def test_another_kind_replaces_instead_of_merging(write):
    write("a.yaml", "m: {kind: attention, heads: 2}\nn: {kind: attention, heads: 2}\n")
    data = read_yaml(write("b.yaml", "include: a.yaml\nm: {kind: convolution}\nn: {kind: attention, window: 8}\n"))
    assert data["m"] == {"kind": "convolution"}
    assert data["n"] == {"kind": "attention", "heads": 2, "window": 8}


PRESETS = "seed: 0\npresets:\n  cpu: {seed: 1}\n  cuda: {seed: 2}\n  big: {seed: 3, model: {dim: 512}}\n"


@pytest.mark.parametrize(
    ("text", "arguments", "seed"),
    [
        ("", {}, 1),
        ("", {"device": "cuda"}, 2),
        ("", {"device": "mps"}, 0),
        ("preset: big\n", {}, 3),
        ("preset: big\n", {"overrides": ["preset=cuda"]}, 2),
        ("preset: big\n", {"overrides": ["preset=cuda"], "preset": "cpu"}, 1),
        ("", {"overrides": ["preset=null"]}, 0),
        ("", {"preset": "big", "overrides": ["seed=9"]}, 9),
    ],
)
def test_which_preset_applies(write, text, arguments, seed):
    assert resolve(Recipe, write("a.yaml", PRESETS + text), **arguments).seed == seed


def test_resolved_recipe_does_not_apply_the_preset_again(write):
    config = resolve(Recipe, write("a.yaml", PRESETS), ["seed=9"])
    assert resolve(Recipe, to_dict(config)) == config


USER_MIXER = """
from typing import Literal
from config_zoo import Mixer
count = globals().get("count", 0) + 1

class {name}(Mixer):
    kind: Literal["{kind}"] = "{kind}"
    decay: float = 0.5
"""


def test_imported_file_registers_its_kinds_and_the_saved_config_finds_it_again(write, tmp_path, monkeypatch):
    write("blocks/mine.py", USER_MIXER.format(name="Mine", kind="mine"))
    write("blocks/model.yaml", "imports: mine.py\nlayers: [{kind: block, mixer: {kind: mine, decay: 0.1}}]\n")
    config = resolve(Recipe, write("run.yaml", "model: {include: blocks/model.yaml}\n"))
    assert config.imports == (str((tmp_path / "blocks/mine.py").resolve()),)
    saved = write("elsewhere/config.yaml", to_yaml(config))
    loaded = set(sys.modules)
    assert resolve(Recipe, saved) == config
    assert set(sys.modules) == loaded  # once each


def test_a_copy_of_a_file_is_the_same_blocks(write):
    """As in a model folder, which holds copies; otherwise its kinds would be taken."""
    for folder in ("one", "two"):
        write(f"{folder}/copied.py", USER_MIXER.format(name="Copied", kind="copied"))
    for folder in ("one", "two"):
        path = write(
            f"{folder}/run.yaml", "imports: copied.py\nmodel: {layers: [{kind: block, mixer: {kind: copied}}]}\n"
        )
        resolve(Recipe, path)


def test_import_by_module_name(write, tmp_path, monkeypatch):
    write("my_blocks_for_test.py", USER_MIXER.format(name="Named", kind="named"))
    monkeypatch.syspath_prepend(tmp_path)
    resolve(Recipe, {"imports": ["my_blocks_for_test"]})
    assert "named" in Mixer.kinds()


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("broken.py", "x = 1\ny = undefined\n", r"broken\.py:2: NameError: name 'undefined' is not defined"),
        (
            "taken.py",
            USER_MIXER.format(name="Again", kind="attention"),
            "kind 'attention' is already taken by config_zoo",
        ),
        ("missing.py", None, r"missing\.py: FileNotFoundError"),
    ],
)
def test_a_module_that_does_not_import(write, name, code, message):
    if code:
        write(name, code)
    with pytest.raises(ConfigError, match=message):
        resolve(Recipe, write("run.yaml", f"imports: [{name}]\n"))


def test_a_missing_module():
    with pytest.raises(ConfigError, match="imports: no_such_module_here: ModuleNotFoundError"):
        resolve(Recipe, {"imports": ["no_such_module_here"]})


def test_python_objects_may_stand_in_the_mapping():
    config = resolve(Recipe, {"model": {"layers": (Block(mixer=Attention(heads=4)),)}}, ["**.heads=2"])
    assert config.model.layers[0].mixer.heads == 2


class TestBadFiles:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nb: {c: 2\n", r"run\.yaml:\d: "),
            ("a: 1\nb:\n  c: 2\n  c: 3\n", r"run\.yaml:4: duplicate key 'c', first on line 3"),
            ("a:\n\tb: 1\n", r"run\.yaml:2: .*indent with spaces, not tabs"),
            ("", "the file is empty"),
            ("- a\n- b\n", r"expected a mapping of keys, got \['a', 'b'\]"),
            ("include: {a: 1}\n", r"run\.yaml: include: expected a name or a list of names, got \{a: 1\}"),
            ("include: modle.yaml\n", r"include: no file 'modle\.yaml' .* Did you mean 'model\.yaml'\?"),
            ("include: run.yaml\n", r"include cycle: .*run\.yaml -> .*run\.yaml"),
            ("preset: bgi\npresets: {big: {}}\n", r"run\.yaml: preset: unknown preset 'bgi'\. Did you mean 'big'\?"),
            ("preset: big\n", "unknown preset 'big'. This recipe has no presets"),
            ("presets: [a]\n", "presets: expected a mapping of names to partial recipes"),
            ("x: !!python/object:os.system {}\n", r"run\.yaml:1: could not determine a constructor"),
        ],
    )
    def test_message(self, write, text, message):
        write("model.yaml", "dim: 8\n")
        with pytest.raises(ConfigError, match=message):
            resolve(Recipe, write("run.yaml", text))

    def test_longer_cycle_names_every_file(self, write):
        write("a.yaml", "include: b.yaml\n")
        write("b.yaml", "model: {include: a.yaml}\n")
        with pytest.raises(ConfigError, match=r"a\.yaml -> .*b\.yaml -> .*a\.yaml"):
            read_yaml(write("run.yaml", "include: a.yaml\n"))

    def test_one_file_may_be_included_twice(self, write):
        write("model.yaml", "dim: 8\n")
        write("a.yaml", "model: {include: model.yaml}\n")
        assert read_yaml(write("run.yaml", "include: [a.yaml, a.yaml]\n")) == {"model": {"dim": 8}}

    def test_missing_or_unreadable(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
            resolve(Recipe, tmp_path / "nothing.yaml")
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
            resolve(Recipe, tmp_path / "binary.yaml")
        with pytest.raises(ConfigError, match="cannot be read"):
            resolve(Recipe, tmp_path)


def test_imports_given_as_an_override(write, tmp_path, monkeypatch):
    """Before the overrides that name what they define, and absolute, so that the saved configuration finds them."""
    write("late.py", USER_MIXER.format(name="Late", kind="late"))
    path = write("run.yaml", "model: {layers: [{kind: block}]}\n")
    monkeypatch.chdir(tmp_path)
    config = resolve(Recipe, path, ["model.layers.0.mixer={kind: late, decay: 0.1}", "imports=late.py"])
    assert config.imports == (str((tmp_path / "late.py").resolve()),)
    assert config.model.layers[0].mixer.decay == 0.1
    with pytest.raises(ConfigError, match="imports: no_such_module_here"):
        resolve(Recipe, path, ["imports=[no_such_module_here]"])
