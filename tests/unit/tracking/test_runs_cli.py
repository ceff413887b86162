"""`treadle runs`, its figures and its terminal curves."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from treadle.cli.runs import app, complete_run
from treadle.errors import RunError
from treadle.tracking import Run
from treadle.tracking.plot import load_series, plot_runs, plot_training, smoothed
from treadle.tracking.terminal import chart, sparkline

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "runs"
    for name, lr in (("slow", 1e-4), ("fast", 1e-3)):
        config = {"optimizer": {"lr": lr}, "model": {"dim": 64}, "note": "[bold]x[/bold]"}
        text = f"optimizer:\n  lr: {lr}\nmodel:\n  dim: 64\nnote: '[bold]x[/bold]'\n"
        with Run.create(root, name, config, text) as run:
            for step in range(1, 101):
                metrics = {"loss": 2 + 100 * lr / step, "lr": lr, "grad_norm": 1.0, "tokens_per_second": 10.0}
                run.log(step, {**metrics, "tokens": step * 100, "flops": step * 1e9})
                if step % 50 == 0:
                    run.log(step, {"loss": 2.5, "bits_per_byte": 0.9}, kind="evaluate")
            run.sample(100, "The loom", " weaves [red]cloth[/red]")
    return root


def call(*words, root):
    result = CliRunner().invoke(app, [*map(str, words), "--root", str(root)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_list_shows_and_filters(root):
    assert "fast-" in call("list", root=root)
    assert "slow-" in call("list", root=root)
    assert "slow-" not in call("list", "--where", "optimizer.lr=1e-3", root=root)
    assert "fast-" not in call("list", "--name", "slow", "--state", "finished", root=root)
    (only,) = json.loads(call("list", "--sort", "-optimizer.lr", "--limit", "1", "--json", root=root))
    assert only["name"] == "fast"
    assert only["metrics"]["evaluate/bits_per_byte"] == 0.9
    assert "no such runs" in call("list", "--state", "failed", root=root)
    with pytest.raises(RunError, match="'done': expected one of running"):
        call("list", "--state", "done", root=root)


def test_a_pipe_gets_whole_ids(root):
    (run_id,) = [path.name for path in root.glob("slow-*")]
    assert run_id in call("list", "--where", "note!=1", "--where", "model.dim=64", root=root)


def test_show_tells_all_of_one_run(root):
    shown = call("show", "slow", root=root)
    for part in (
        "finished",
        "step 100",
        "optimizer.lr=0.0001",
        "grad_norm",
        "evaluate/loss",
        "[red]cloth[/red]",
        "torch",
    ):
        assert part in shown
    assert json.loads(call("show", "--json", root=root))["last_sample"]["step"] == 100
    with pytest.raises(RunError, match="Did you mean 'slow-"):
        call("show", "slwo", root=root)


def test_show_works_on_a_run_that_has_logged_nothing(tmp_path):
    with Run.create(tmp_path, "empty", {}, "") as run:
        assert "running" in call("show", run.id, root=tmp_path)


def test_compare_shows_the_difference_only(root):
    shown = call("compare", "slow", "fast", root=root)
    assert "optimizer.lr" in shown
    assert "model.dim" not in shown
    compared = json.loads(call("compare", "slow", "fast", "--json", root=root))
    assert [sorted(values.values()) for values in compared["config"].values()] == [[1e-4, 1e-3]]
    with pytest.raises(RunError, match="two different runs"):
        call("compare", "slow", "slow", root=root)


def test_index_counts(root):
    assert call("index", "--rebuild", root=root).startswith("2 runs in")


@pytest.mark.parametrize(
    "options",
    [("slow",), ("slow", "fast", "--metric", "evaluate/loss", "--metric", "loss", "--x", "tokens", "--smooth", "0.9")],
)
def test_plot_writes_a_figure(root, tmp_path, options):
    output = tmp_path / "figures" / "out.png"
    call("plot", *options, "--output", output, root=root)
    assert output.read_bytes().startswith(PNG)


def test_completion_offers_ids_and_stays_silent_on_trouble(root, tmp_path):
    context = SimpleNamespace(params={"root": root})
    assert [word.split("-")[0] for word in complete_run(context, "")] == ["fast", "slow", "latest"]
    assert complete_run(context, "la") == ["latest"]
    (tmp_path / "file").touch()
    assert complete_run(SimpleNamespace(params={"root": tmp_path / "file"}), "") == []


def test_the_command_starts_without_heavy_imports():
    script = (
        "import sys, treadle.cli.runs; print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_no_display_is_needed_and_pyplot_is_left_alone(root, tmp_path):
    script = (
        "import sys; from pathlib import Path; from treadle.tracking.plot import plot_training\n"
        "plot_training(Path(sys.argv[1]), Path(sys.argv[2])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    (folder,) = root.glob("slow-*")
    words = [sys.executable, "-c", script, str(folder), str(tmp_path / "a.svg")]
    subprocess.run(words, check=True, env=environment)


def test_evaluations_are_placed_on_the_axes_of_training(root):
    (folder,) = root.glob("slow-*")
    for x, expected in (("step", [50, 100]), ("tokens", [5000, 10000]), ("flops", [5e10, 1e11])):
        xs, ys = load_series(folder, "evaluate/loss", x)
        assert (xs.tolist(), ys.tolist()) == (expected, [2.5, 2.5])
    assert np.all(np.diff(load_series(folder, "loss", "time")[0]) >= 0)


def test_figure_errors_say_what_there_is(root, tmp_path):
    (folder,) = root.glob("slow-*")
    with pytest.raises(RunError, match=r"no metric 'los'\. Logged: evaluate/bits_per_byte, evaluate/loss, flops"):
        plot_runs([folder], ["los"], output=tmp_path / "a.png")
    with pytest.raises(RunError, match="'epoch': expected one of step, tokens, time, flops"):
        plot_runs([folder], ["loss"], "epoch", output=tmp_path / "a.png")
    with pytest.raises(RunError, match=r"cannot write a '\.xyz' file"):
        plot_training(folder, tmp_path / "a.xyz")
    with pytest.raises(RunError, match="expected at least 0 and below 1"):
        plot_runs([folder], ["loss"], smooth=1.0, output=tmp_path / "a.png")


def test_a_run_with_evaluations_of_several_datasets_and_nan_is_drawn(tmp_path):
    with Run.create(tmp_path, "many", {}, "") as run:
        for step in range(1, 500):
            run.log(step, {"loss": math.nan if step == 7 else 10 / step})
        run.log(400, {"loss": 1.0}, kind="evaluate/books")
        run.log(400, {"loss": 1.2}, kind="evaluate/code")
    assert plot_training(run.folder, tmp_path / "a.png").read_bytes().startswith(PNG)
    with Run.create(tmp_path, "nothing", {}, "") as run, pytest.raises(RunError, match="no loss"):
        plot_training(run.folder, tmp_path / "b.png")


def test_smoothing_is_the_weighted_mean_of_the_past():
    rng, weight = np.random.default_rng(0), 0.8
    y = rng.normal(size=50)
    y[10] = np.nan
    result = smoothed(y, weight)
    past = [value for value in y[:31] if np.isfinite(value)]
    weights = [weight**age for age in range(len(past))][::-1]
    assert result[30] == pytest.approx(np.average(past, weights=weights))
    assert np.isnan(result[10])
    assert np.array_equal(smoothed(y, 0.0), y, equal_nan=True)


def test_sparkline():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], width=2) == "▁█"
    assert sparkline([1.0, math.nan, None, math.inf, 2.0]) == "▁×××█"
    assert sparkline([99, 100], from_zero=True) == "██"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([]) == ""


def test_chart_joins_its_points():
    lines = chart([8 - step for step in range(8)], width=4, height=2)
    assert len(lines) == 2
    assert all(len(line) == 4 for line in lines)
    dots = np.zeros((8, 8), dtype=bool)
    order = {
        0: (0, 0),
        1: (1, 0),
        2: (2, 0),
        3: (0, 1),
        4: (1, 1),
        5: (2, 1),
        6: (3, 0),
        7: (3, 1),
    }  # Unicode's dot numbers
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            for bit, (down, right) in order.items():
                dots[row * 4 + down, column * 2 + right] = (ord(character) - 0x2800) >> bit & 1
    assert np.array_equal(dots, np.eye(8, dtype=bool))
    steep = chart([10, 0], width=1, height=2)
    assert [ord(line) - 0x2800 > 0 for line in steep] == [True, True]
    assert [len(line) for line in chart([3, 2, 1], width=10, height=3)] == [10, 10, 10]
    assert len(set(chart([5.0], width=3, height=1)[0])) == 1  # a level line
    assert chart([math.nan]) == chart([]) == []
