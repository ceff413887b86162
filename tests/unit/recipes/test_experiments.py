"""The experiments: their recipes resolve, a figure is redrawn from its numbers, and runs are trained once."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from treadle import recipes
from treadle.config import to_dict
from treadle.errors import RunError
from treadle.nn.config import MixerConfig
from treadle.tracking.read import load_status

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "recipes/experiments"
NAMES = ("extrapolation", "mqar")
PNG = b"\x89PNG\r\n\x1a\n"
ORIGIN = {"quick": False, "device": "NVIDIA Loom", "torch": "2.11.0", "revision": "0123456789", "seconds": 90}
NUMBERS = {
    "extrapolation": {
        "trained_at": 256,
        "lengths": [256, 512],
        "bits_per_byte": {name: [1.25, 1.5] for name in ("alibi", "rope", "longrope", "sinusoidal")},
    },
    "mqar": {
        "length": 256,
        "dims": [32, 64],
        "pairs": [16, 64],
        "accuracy": {"attention": [[0.5, 1.0], [0.25, 0.99]], "window": [[0.1, 0.1], [0.0, 0.0]]},
    },
}
TABLES = {
    "extrapolation": "| bits per byte at | 256 | 512 |\n| --- | --- | --- |\n| ALiBi | 1.250 | 1.500 |\n| RoPE |",
    "mqar": "| attention | 32 | 50.0% | 100.0% |\n| attention | 64 | 25.0% | 99.0% |",
}


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def script(name):
    return importlib.import_module(name)


def redraw(name, out):
    asked = script("experiment").arguments("", runs="x", jobs=1).parse_args(["--redraw", "--out", str(out)])
    module = script(name)
    script("experiment").carry_out(asked, name, module.measure, module.draw, module.table)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_resolve(path):
    if "gated-delta" in path.stem and "gated_delta" not in MixerConfig.kinds():
        pytest.skip("there is no gated_delta mixer")
    config = recipes.load(path)
    assert config.name == path.stem or path.stem in ("extrapolation", "mqar")


def test_variants_of_extrapolation_differ_in_positions_only():
    base, *others = (to_dict(recipes.load(FOLDER / name)) for name in script("extrapolation").RECIPES.values())
    for config in (base, *others):
        del config["name"], config["model"]["position"], config["model"]["layers"][0]["mixer"]["position"]
    assert all(other == base for other in others)


@pytest.mark.parametrize("name", NAMES)
def test_redraw_needs_the_numbers_only(name, tmp_path, capsys):
    out = tmp_path / "figures"
    with pytest.raises(RunError, match=rf"{name}\.json: no numbers to draw; run without --redraw first"):
        redraw(name, out)
    out.mkdir()
    (out / f"{name}.json").write_text(json.dumps(NUMBERS[name] | ORIGIN))
    page = tmp_path / "experiments.md"
    page.write_text(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n")
    redraw(name, out)
    assert (out / f"{name}.png").read_bytes().startswith(PNG)
    text = page.read_text()
    assert TABLES[name] in text
    assert "NVIDIA Loom, torch 2.11.0, revision 0123456, 1.5 minutes in all.\n<!-- /" in text
    assert text.startswith(f"before\n<!-- {name} -->\n|")
    assert text.endswith("after\n")
    assert "old" not in text
    redraw(name, out)
    assert page.read_text() == text
    assert TABLES[name] in capsys.readouterr().out
    page.write_text("no place")
    with pytest.raises(RunError, match=f"no <!-- {name} --> ... <!-- /{name} --> to put the table in"):
        redraw(name, out)


def test_quick_numbers_stay_with_the_runs(tmp_path):
    """The figures of the documentation are not drawn anew at toy sizes."""
    figures = REPOSITORY / "docs/figures"
    before = {path.name: path.stat().st_mtime_ns for path in figures.glob("*")}
    experiment = script("experiment")
    asked = experiment.arguments("", runs="x", jobs=1).parse_args(["--quick", "--runs", str(tmp_path)])
    measured = NUMBERS["mqar"] | {"quick": True}
    experiment.carry_out(asked, "mqar", lambda _: measured, script("mqar").draw, script("mqar").table)
    assert {"mqar.json", "mqar.png"} <= {path.name for path in tmp_path.iterdir()}
    assert {path.name: path.stat().st_mtime_ns for path in figures.glob("*")} == before


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_committed_numbers(name):
    page, numbers = (REPOSITORY / "docs/experiments.md").read_text(), REPOSITORY / f"docs/figures/{name}.json"
    if not numbers.is_file():
        pytest.skip("not measured")
    result = json.loads(numbers.read_text())
    assert not result["quick"]
    experiment = script("experiment")
    rows = f"{script(name).table(result)}\n\n{experiment.origin(result)}"
    assert experiment.filled(page, name, rows) == page, f"python recipes/experiments/{name}.py --redraw"


def test_a_run_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(script("mqar"), "QUICK_DIMS", (16,))
    parser = script("experiment").arguments("", runs="x", jobs=1)
    changes = ["device=cpu", "training.steps=2", "evaluate.samples=20"]
    asked = parser.parse_args(["--quick", "--runs", str(tmp_path), *changes])
    asked.only = ["attention"]
    first = script("mqar").measure(asked)
    folder = tmp_path / "attention-dim-16"
    assert first["pairs"] == [2, 4, 8]
    assert first["accuracy"] == {"attention": [[*load_status(folder)["summary"].values()]]}
    when = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert script("mqar").measure(asked) == first
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == when
    asked.overrides = [*changes, "seed=1"]
    with pytest.raises(RunError, match="holds a run of another configuration; delete it, or choose another --runs"):
        script("mqar").measure(asked)
