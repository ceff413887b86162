"""Listing and finding runs: the index follows the folders, whatever happens to it."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treadle.errors import RunError
from treadle.tracking import Run, Runs, read
from treadle.tracking.index import INDEX_FILE
from treadle.tracking.query import Condition, RunRecord


def write_run(root: Path, run_id: str, *, lr: float = 3e-4, loss: float = 2.0, state: str = "finished") -> Path:
    """A run folder as a copy from another machine would leave it."""
    folder = root / run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"optimizer: {{kind: adamw, lr: {lr}}}\nlayers: [{{mixer: attention}}]\n")
    status = {"name": run_id, "state": state, "started": "2026-01-01T00:00:00+00:00", "updated": "", "step": 10}
    (folder / "status.json").write_text(json.dumps({**status, "elapsed": 1.0, "summary": {"loss": loss}}))
    return folder


def ids(runs) -> list[str]:
    return [run.id for run in runs]


def test_two_thousand_runs_list_and_filter_within_a_second(tmp_path):
    for number in range(2000):
        write_run(tmp_path, f"run-{number:04d}", lr=number * 1e-6, loss=number / 1000)
    assert len(Runs(tmp_path).list()) == 2000
    began = time.perf_counter()
    assert len(Runs(tmp_path).list()) == 2000
    listed = time.perf_counter()
    found = Runs(tmp_path).list(where=["loss<1", "optimizer.lr>=5e-4"], sort="-loss", limit=3)
    filtered = time.perf_counter()
    assert ids(found) == ["run-0999", "run-0998", "run-0997"]
    assert listed - began < 1
    assert filtered - listed < 1


def test_copied_edited_and_deleted_folders_are_noticed(tmp_path):
    runs = Runs(tmp_path)
    first = write_run(tmp_path, "first")
    (tmp_path / "not-a-run").mkdir()
    assert ids(runs.list()) == ["first"]
    shutil.copytree(first, tmp_path / "copy")
    assert ids(runs.list()) == ["first", "copy"]
    (first / "config.yaml").write_text("optimizer: {lr: 1.0}\n")
    assert ids(runs.list(where=["optimizer.lr=1"])) == ["first"]
    shutil.rmtree(tmp_path / "copy")
    assert ids(runs.list()) == ["first"]


def test_a_status_replaced_within_the_clocks_tick_is_noticed(tmp_path):
    folder = write_run(tmp_path, "run", loss=2.0)
    runs = Runs(tmp_path)
    assert runs.list()[0].summary == {"loss": 2.0}
    status, stat = folder / "status.json", (folder / "status.json").stat()
    replacement = folder / "new"
    replacement.write_text(status.read_text().replace("2.0", "3.0"))
    os.replace(replacement, status)
    os.utime(status, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert runs.list()[0].summary == {"loss": 3.0}


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(20_000))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_version(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "runs": {"run-00": {"state": "finished"}}}))


@pytest.mark.parametrize("damage", [Path.unlink, garbage, half, other_version], ids=lambda d: d.__name__)
def test_a_deleted_or_damaged_index_is_rebuilt(tmp_path, damage):
    for number in range(40):
        write_run(tmp_path, f"run-{number:02d}")
    runs = Runs(tmp_path)
    before = ids(runs.list())
    assert len(before) == 40
    path = tmp_path / INDEX_FILE
    damage(path)
    assert ids(runs.list()) == before
    assert len(json.loads(path.read_text())["runs"]) == 40


def test_an_index_that_cannot_be_used_is_done_without(tmp_path):
    write_run(tmp_path, "run")
    (tmp_path / INDEX_FILE).mkdir()
    assert ids(Runs(tmp_path).list()) == ["run"]


def test_only_what_has_changed_is_read_again(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_run(tmp_path, name)
    Runs(tmp_path).list()
    written = (tmp_path / INDEX_FILE).stat().st_mtime_ns
    opened = []
    monkeypatch.setattr(
        read, "load_status", lambda folder, load=read.load_status: opened.append(folder) or load(folder)
    )
    monkeypatch.setattr(read, "load_config", lambda folder: pytest.fail("the configuration has not changed"))
    assert len(Runs(tmp_path).list()) == 2
    assert opened == []
    assert (tmp_path / INDEX_FILE).stat().st_mtime_ns == written
    (tmp_path / "b" / "status.json").write_text((tmp_path / "b" / "status.json").read_text().replace("2.0", "NaN"))
    assert len(Runs(tmp_path).list()) == len(Runs(tmp_path).list()) == 2
    assert opened == [tmp_path / "b"]


def test_an_unreadable_run_is_shown_and_does_not_hide_the_others(tmp_path):
    write_run(tmp_path, "good")
    for name, content in (("torn", '{"state": "fin'), ("foreign", '{"state": 5}'), ("list", "[1]")):
        (write_run(tmp_path, name) / "status.json").write_text(content)
    (write_run(tmp_path, "config") / "config.yaml").write_text("a: [")
    states = {run.id: run.state for run in Runs(tmp_path).list()}
    bad = dict.fromkeys(("torn", "foreign", "list"), "unreadable")
    assert states == {"good": "finished", "config": "finished", **bad}


def test_running_without_a_process_is_died(tmp_path):
    run = Run.create(tmp_path, "live", {}, "a: 1\n")
    write_run(tmp_path, "copied", state="running")
    assert {r.name: r.state for r in Runs(tmp_path).list()} == {"live": "running", "copied": "died"}
    run.log(1, {"loss": 1.5})
    run.finish()
    assert [(r.name, r.metrics) for r in Runs(tmp_path).list("finished")] == [("live", {"loss": 1.5})]


def test_many_processes_share_one_index(tmp_path):
    script = """
import sys
from pathlib import Path
from treadle.tracking import Run, Runs
for number in range(5):
    with Run.create(Path(sys.argv[1]), sys.argv[2], {}, "a: 1\\n") as run:
        run.summary(loss=number)
        Runs(sys.argv[1]).list()
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), f"w{n}"]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    runs = Runs(tmp_path).list()
    assert len(runs) == 15
    assert {run.state for run in runs} == {"finished"}
    assert len(json.loads((tmp_path / INDEX_FILE).read_text())["runs"]) == 15


def test_no_root_is_no_runs_and_leaves_nothing_behind(tmp_path):
    assert Runs(tmp_path / "none").list() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(RunError, match="There are no runs yet"):
        Runs(tmp_path / "none").find("latest")


def test_find_takes_a_path_an_id_a_prefix_and_latest(tmp_path, monkeypatch):
    for name in ("alpha-1", "alpha-2", "beta-1"):
        write_run(tmp_path / "runs", name)
    newest = tmp_path / "runs" / "alpha-2" / "status.json"
    newest.write_text(newest.read_text().replace("2026-01-01", "2026-01-02"))
    elsewhere = write_run(tmp_path / "elsewhere", "gamma")
    runs = Runs(tmp_path / "runs")
    monkeypatch.chdir(elsewhere)
    wanted = {"alpha-1": "alpha-1", "b": "beta-1", "latest": "alpha-2", str(elsewhere): "gamma", ".": "gamma"}
    assert {reference: runs.find(reference).id for reference in wanted} == wanted
    with pytest.raises(RunError, match=r"'alpha' is the beginning of 2 ids: alpha-2, alpha-1\."):
        runs.find("alpha")
    with pytest.raises(RunError, match=r"'bta-1': no such run in .*runs\. Did you mean 'beta-1'\?"):
        runs.find("bta-1")


def test_the_name_without_its_date_is_enough_for_a_hint(tmp_path):
    run = Run.create(tmp_path, "baseline", {}, "")
    run.finish()
    with pytest.raises(RunError, match=rf"Did you mean '{run.id}'"):
        Runs(tmp_path).find("basline")


def test_a_key_that_no_run_has_is_an_error(tmp_path):
    write_run(tmp_path, "run")
    with pytest.raises(RunError, match=r"'optimzer\.lr': no run has .* Did you mean 'optimizer\.lr'\?"):
        Runs(tmp_path).list(where=["optimzer.lr=1"])
    with pytest.raises(RunError, match="'los': no run has"):
        Runs(tmp_path).list(sort="los")
    with pytest.raises(RunError, match="expected key=value"):
        Runs(tmp_path).list(where=["loss"])


RECORD = RunRecord(
    id="r",
    folder=Path("r"),
    state="finished",
    started="2026-02-01T10:00:00+00:00",
    metrics={"loss": 3.0, "evaluate/loss": 3.1},
    summary={"loss": 2.5, "nan": float("nan")},
    config={"optimizer.lr": 3e-4, "compile": True, "resume": None, "layers[0].kind": "attention", "lr_text": "1e-3"},
)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("loss<3", True),  # the summary goes before the latest metric
        ("evaluate/loss > 3", True),
        ("optimizer.lr=3e-4", True),
        ("optimizer.lr == 0.0003", True),
        ("optimizer.lr!=0.0003", False),
        ("lr_text=0.001", True),  # PyYAML reads 1e-3 as text
        ("compile=true", True),
        ("compile=1", False),
        ("resume=null", True),
        ("layers[0].kind=attention", True),
        ("state=finished", True),
        ("started>=2026-02", True),
        ("nan<1", False),
        ("absent=1", False),
        ("absent!=1", True),
    ],
)
def test_conditions(condition, expected):
    assert Condition.parse(condition).matches(RECORD) is expected


def test_runs_without_the_sorted_value_come_last_either_way(tmp_path):
    for name, loss in (("b", 2.0), ("nan", float("nan")), ("a", 10.0)):
        write_run(tmp_path, name, loss=loss)
    status = write_run(tmp_path, "none") / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "summary": {}}))
    assert ids(Runs(tmp_path).list(sort="loss")) == ["b", "a", "none", "nan"]
    assert ids(Runs(tmp_path).list(sort="-loss")) == ["a", "b", "none", "nan"]
