"""`treadle config`, and the recipes it finds by name, with a recipe that has no model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from treadle import cli, recipes
from treadle.cli.config import complete_overrides
from treadle.errors import ConfigError

FAKE = '''
from typing import Literal
from pydantic import Field, PositiveInt
from treadle.config import Config, Kind

class Optimizer(Kind):
    lr: float = Field(1e-3, description="step size")

class Adam(Optimizer):
    """Adam."""
    kind: Literal["adam"] = "adam"

class Sgd(Optimizer):
    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.9

class RecipeConfig(Config):
    recipe: Literal["NAME"] = "NAME"
    imports: tuple[str, ...] = ()
    device: str = "auto"
    steps: PositiveInt
    parts: list[Optimizer] = Field([Adam()])
'''


@pytest.fixture(scope="module", autouse=True)
def fake_recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "fake_weave.py").write_text(FAKE.replace("NAME", "fake_weave"))
    recipes.__path__.append(str(folder))
    yield
    recipes.__path__.remove(str(folder))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: fake_weave\ndevice: cpu\nsteps: 10\nparts: [adam, sgd]\npresets: {cuda: {steps: 1000}}\n")
    return path


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["config", *map(str, arguments)])


def test_show_prints_what_runs_again(recipe, tmp_path):
    first = run("show", recipe, "parts.*.lr=3e-5")
    assert first.exit_code == 0, first.output
    assert first.output.startswith(
        "recipe: fake_weave\nimports: []\ndevice: cpu\nsteps: 10\nparts:\n  - kind: adam\n    lr: 3.0e-5\n"
    )
    (tmp_path / "again.yaml").write_text(first.output)
    assert run("show", tmp_path / "again.yaml").output == first.output


def test_show_applies_a_preset(recipe):
    assert "steps: 1000" in run("show", recipe, "--preset", "cuda").output
    assert "steps: 1000" in run("show", recipe, "device=cuda:1").output  # the preset of the device that it runs on
    assert "steps: 10\n" in run("show", recipe).output


def test_errors_name_the_file(recipe):
    result = run("show", recipe, "parts.0.lrr=1", "steps=none")
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {recipe}: 2 problems\n"
        "  steps: expected int > 0, got 'none'\n"
        "  parts[0].lrr: unknown key. Did you mean 'lr'?\n"
    )


def test_keys_of_a_recipe_and_of_a_file(recipe):
    by_name = run("keys", "fake_weave").output
    assert by_name == run("keys", recipe).output
    assert [line.split() for line in by_name.splitlines()] == [
        ["key", "type", "default", "description"],
        ["recipe", "fake_weave", "fake_weave"],
        ["imports", "list[text]", "[]"],
        ["device", "text", "auto"],
        ["steps", "int", ">", "0", "required"],
        ["parts", "list[adam", "|", "sgd]", "[{kind:", "'adam'}]"],
        ["parts[](adam)", "kind", "Adam."],
        ["parts[](adam).lr", "float", "0.001", "step", "size"],
        ["parts[](sgd)", "kind"],
        ["parts[](sgd).lr", "float", "0.001", "step", "size"],
        ["parts[](sgd).momentum", "float", "0.9"],
    ]


def test_keys_filtered(monkeypatch):
    monkeypatch.setattr(recipes, "names", lambda: ["fake_weave"])
    assert [line.split()[0] for line in run("keys", "parts.0.mom").output.splitlines()] == [
        "key",
        "parts[](sgd).momentum",
    ]
    assert len(run("keys", "--grep", "STEP size").output.splitlines()) == 3
    assert run("keys", "nothing").exit_code == 2


def test_diff(recipe, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.yaml").write_text(run("show", recipe, "steps=20").output + "retired_key: 1\n")
    lines = [line.split() for line in run("diff", recipe, tmp_path / "saved").output.splitlines()]
    assert lines == [
        ["key", str(recipe), str(tmp_path / "saved")],
        ["steps", "10", "20"],
        ["retired_key", "(absent)", "1"],
    ]
    assert run("diff", recipe, recipe).output == "no difference\n"
    assert run("diff", recipe, "-o", "**.lr=0.1").output.split()[-3:] == ["parts[1].lr", "0.001", "0.1"]
    assert run("diff", recipe).exit_code == 2
    assert run("diff", tmp_path / "saved", "-o", "steps=1").exit_code == 2


def test_completion(recipe):
    context = SimpleNamespace(params={"recipe": recipe})
    assert complete_overrides(context, "pa") == ["parts=", "parts.*=", "parts.*.lr=", "parts.*.momentum="]
    assert complete_overrides(SimpleNamespace(params={"recipe": "missing.yaml"}), "pa") == []
    assert complete_overrides(SimpleNamespace(params={}), "pa") == []


def test_unknown_recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("recipe: fake_weav\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: recipe: unknown recipe 'fake_weav'\. Did you mean 'fake_weave'\?"):
        recipes.load(path)
    with pytest.raises(ConfigError, match="unknown recipe 'fake_weav'"):
        recipes.schema("fake_weav")
    path.write_text("steps: 3\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: needs a top-level `recipe:`, one of: .*fake_weave"):
        recipes.load(path)
