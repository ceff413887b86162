"""What a run leaves on disk, and that it survives kills, second writers, torn lines and full disks."""

import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import RunError
from treadle.tracking import Run, load_config, load_environment, load_metrics, load_samples, load_status
from treadle.tracking.files import LineWriter, read_lines, restore_floats
from treadle.tracking.lock import is_locked

CONFIG = {"optimizer": {"lr": 3e-4}}
YAML = "optimizer:\n  lr: 0.0003\n"

WRITER = """
import sys
from pathlib import Path
from treadle.tracking import Run
folder = Path(sys.argv[1])
if (folder / "status.json").exists():
    run = Run.resume(folder)
    step = run._status["step"]
else:
    run, step = Run.create(folder.parent, "w", {}, "a: 1\\n", folder=folder), 0
print("ready", flush=True)
while True:
    step += 1
    run.log(step, {"loss": 1 / step, "tokens": step * 1024})
    run.sample(step, "prompt", "text " * 50)
"""


@pytest.fixture
def make(tmp_path):
    def make(**options):
        return Run.create(tmp_path, "trial", CONFIG, YAML, **options)

    return make


def start_writer(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_run_describes_itself(make):
    with make() as run:
        run.log(1, {"loss": 2.5, "tokens": 1024})
        run.log(1, {"loss": 2.75, "bits_per_byte": 1.5}, kind="evaluate")
        run.sample(1, "The loom", " weaves\n→ \ud800")
        run.summary(loss=2.5, best="step-1")
    status = load_status(run.folder)
    assert status["state"] == "finished"
    assert status["step"] == 1
    assert status["pid"] == os.getpid()
    assert status["metrics"] == {"loss": 2.5, "tokens": 1024, "evaluate/loss": 2.75, "evaluate/bits_per_byte": 1.5}
    assert status["summary"] == {"loss": 2.5, "best": "step-1"}
    assert (run.folder / "config.yaml").read_text() == YAML
    assert load_config(run.folder) == CONFIG
    assert load_samples(run.folder) == [{"step": 1, "prompt": "The loom", "text": " weaves\n→ \ud800"}]
    assert load_metrics(run.folder, "evaluate") == {
        "step": [1],
        "time": [pytest.approx(0, abs=5)],
        "kind": ["evaluate"],
        "loss": [2.75],
        "bits_per_byte": [1.5],
    }


def test_the_environment_is_complete_and_names_no_host(make):
    with make() as run:
        pass
    found = load_environment(run.folder)
    assert found["packages"]["pydantic"]
    assert found["packages"]["torch"] == found["torch"]
    assert found["python"] == sys.version.split()[0]
    assert found["cpu"]["cores"] >= 1
    assert found["cpu"]["memory_gib"] > 0
    assert os.uname().nodename not in {json.dumps(value) for value in (found["cpu"], found["gpus"])}
    assert "hostname" not in found


def test_git_state_tells_a_clean_tree_from_a_dirty_one(tmp_path):
    from treadle.tracking.environment import git_state

    assert git_state(tmp_path) is None

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init", "-b", "trunk")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert (len(state["revision"]), state["branch"], state["dirty"]) == (40, "trunk", False)
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path)["dirty"] is True


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    runs = [Run.create(tmp_path, "a/b c", {}, "") for _ in range(3)]
    assert len({run.folder for run in runs}) == 3
    assert all(run.folder.parent == tmp_path and run.id.startswith("a-b-c-2") for run in runs)
    for run in runs:
        run.finish()


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    folder = tmp_path / "exactly" / "here"
    Run.create(tmp_path, "a", {}, "", folder=folder).finish()
    with pytest.raises(RunError, match=r"exactly/here: holds a run already"):
        Run.create(tmp_path, "a", {}, "", folder=folder)
    assert not is_locked(folder)
    with pytest.raises(RunError, match="no run here"):
        Run.resume(tmp_path / "exactly")
    assert [path.name for path in (tmp_path / "exactly").iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("raised", "state", "error"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(1), "interrupted", None),
        (ValueError("loss is\nnan"), "failed", "ValueError: loss is\nnan"),
    ],
)
def test_an_exception_decides_how_the_run_ended(make, raised, state, error):
    with pytest.raises(type(raised)), make() as run:
        raise raised
    status = load_status(run.folder)
    assert (status["state"], status["error"]) == (state, error)
    assert ("Traceback" in (run.folder / "log.txt").read_text()) == (state == "failed")
    assert not is_locked(run.folder)


def test_an_ended_run_takes_no_more(make):
    run = make()
    run.finish("interrupted")
    run.finish()  # the context manager's turn after a trainer's own: the first counts
    assert load_status(run.folder)["state"] == "interrupted"
    with pytest.raises(RunError, match="has ended"):
        run.log(1, {"loss": 1.0})


def test_non_finite_values_read_back(make):
    with make() as run:
        run.log(1, {"loss": math.nan, "up": math.inf, "down": -math.inf})
        run.summary(loss=math.nan)
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON, for other readers
    columns = load_metrics(run.folder)
    assert math.isnan(columns["loss"][0])
    assert (columns["up"], columns["down"]) == ([math.inf], [-math.inf])
    assert math.isnan(load_status(run.folder)["summary"]["loss"])


def test_names_of_the_record_are_refused_as_metrics(make):
    with make() as run, pytest.raises(ValueError, match=r"\['step'\]"):
        run.log(1, {"step": 3})


def test_the_last_record_of_a_step_wins_and_kinds_stay_apart(make):
    with make() as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": float(step)})
        run.log(2, {"loss": 9.0}, kind="evaluate")
    with Run.resume(run.folder) as run:
        run.log(2, {"loss": 20.0})
        run.log(2, {"mfu": 0.5})  # a second call at one step adds to it
    columns = load_metrics(run.folder, "train")
    assert (columns["step"], columns["loss"], columns["mfu"]) == ([1, 2, 3], [1.0, 20.0, 3.0], [None, 0.5, None])
    assert load_metrics(run.folder, "evaluate")["loss"] == [9.0]
    assert sum("loss" in record for record in read_lines(run.folder / "metrics.jsonl")) == 5  # nothing is deleted


def test_time_goes_on_after_a_resume(make):
    with make() as run:
        run._began -= 100
        run.log(1, {"loss": 1.0})
    status = json.loads((run.folder / "status.json").read_text())
    (run.folder / "status.json").write_text(json.dumps(status | {"elapsed": 3.0}))  # older than the last record
    with Run.resume(run.folder) as run:
        run.log(2, {"loss": 1.0})
    first, second = load_metrics(run.folder)["time"]
    assert 100 <= first <= second < first + 5
    assert load_status(run.folder)["resumes"] == 1


def test_resuming_with_another_configuration_keeps_the_old_one(make):
    folder = make_and_finish(make)
    for text in ("a: 1\n", "a: 1\n", "a: 2\n"):
        with Run.resume(folder) as run:
            run.accept_config(text)
    kept = {path.name: path.read_text() for path in folder.glob("config*.yaml")}
    assert kept == {"config.yaml": "a: 2\n", "config-1.yaml": YAML, "config-2.yaml": "a: 1\n"}
    assert len(list(folder.glob("environment*.json"))) == 1  # it did not change


def make_and_finish(make) -> Path:
    run = make()
    run.finish()
    return run.folder


def test_a_second_writer_is_refused_by_folder_and_pid(tmp_path):
    folder = tmp_path / "w"
    process = start_writer(folder)
    try:
        with pytest.raises(RunError, match=rf"{folder}: in use by the process with pid {process.pid}"):
            Run.resume(folder)
        with pytest.raises(RunError, match=rf"pid {process.pid}"):
            Run.create(tmp_path, "w", {}, "", folder=folder)
    finally:
        process.kill()
        process.wait()
    Run.resume(folder).finish()


def test_asking_whether_a_folder_is_locked_never_turns_a_writer_away(tmp_path):
    folder = tmp_path / "w"
    Run.create(tmp_path, "w", {}, "", folder=folder).finish()
    script = "import sys; from pathlib import Path; from treadle.tracking.lock import is_locked\nprint(flush=True)\n"
    asker = subprocess.Popen(
        [sys.executable, "-c", script + "while True: is_locked(Path(sys.argv[1]))", str(folder)], stdout=subprocess.PIPE
    )
    try:
        asker.stdout.readline()
        for _ in range(20):
            Run.resume(folder).finish()
    finally:
        asker.kill()
        asker.wait()


def test_the_lock_does_not_live_on_in_a_forked_worker(tmp_path):
    script = f"""
import os, sys, time
from pathlib import Path
from treadle.tracking import Run
run = Run.create(Path({str(tmp_path)!r}), "w", {{}}, "", folder=Path({str(tmp_path / "w")!r}))
pid = os.fork()
if pid == 0:
    time.sleep(60)
print(pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        assert is_locked(tmp_path / "w")
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # the worker is still there
        deadline = time.monotonic() + 20
        while is_locked(tmp_path / "w"):  # until the worker has come to let go of it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)


def test_killed_at_random_moments_everything_reads_and_resumes(tmp_path):
    folder, dice, reached = tmp_path / "w", random.Random(0), 0
    for _ in range(4):
        process = start_writer(folder)
        time.sleep(dice.uniform(0.01, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        columns = load_metrics(folder, "train")
        assert columns["step"] == list(range(1, len(columns["step"]) + 1))  # not one step is missing
        assert columns["loss"] == [1 / step for step in columns["step"]]
        assert columns["time"] == sorted(columns["time"])
        assert len(columns["step"]) > reached
        reached = len(columns["step"])
        assert load_status(folder)["state"] == "running"
    with Run.resume(folder) as run:
        run.log(reached + 1, {"loss": 0.0})
    assert load_metrics(folder, "train")["step"] == list(range(1, reached + 2))


def test_a_line_torn_at_any_byte_costs_that_line_only(tmp_path):
    records = [{"step": 1, "loss": 1.5}, {"step": 2, "text": "a → b"}]
    whole = tmp_path / "whole"
    writer = LineWriter(whole)
    for record in records:
        writer.write(record)
    writer.close()
    content = whole.read_bytes()
    first_line = content.index(b"\n") + 1
    for length in range(len(content) + 1):
        torn = tmp_path / "torn"
        torn.write_bytes(content[:length])
        # A record is whole once its brace is on disk, with or without the newline.
        expected = records[: (length >= first_line - 1) + (length >= len(content) - 1)]
        assert list(read_lines(torn)) == expected
        writer = LineWriter(torn)
        writer.write({"step": 3})
        writer.close()
        assert list(read_lines(torn)) == [*expected, {"step": 3}]


def test_a_block_of_zeros_left_by_a_power_cut_is_skipped(make):
    folder = make_and_finish(make)
    (folder / "metrics.jsonl").write_bytes(b'{"step":1,"time":0,"kind":"train","loss":1.0}\n' + bytes(4096))
    with Run.resume(folder) as run:
        run.log(2, {"loss": 2.0})
    assert load_metrics(folder)["loss"] == [1.0, 2.0]


def test_a_full_disk_costs_metrics_but_not_the_run(make, monkeypatch, caplog):
    real = os.write
    with make() as run:
        run.log(1, {"loss": 1.0})
        # The disk takes half a line, then nothing, then has room again.
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: len(data) // 2]))
        run.log(2, {"loss": 2.0})
        monkeypatch.setattr(os, "write", full)
        run.log(3, {"loss": 3.0})
        monkeypatch.setattr(os, "write", real)
        run.log(4, {"loss": 4.0})
    assert load_metrics(run.folder)["step"] == [1, 4]
    assert len([record for record in caplog.records if "metrics are being lost" in record.message]) == 1


def full(file, data):
    raise OSError(28, "No space left on device")


def test_the_log_file_gets_the_house_logger_while_the_run_is_open(make):
    logger = logging.getLogger("treadle.train.loop")
    with make() as run:
        logger.info("resuming from step 40")
    logger.info("afterwards")
    text = (run.folder / "log.txt").read_text()
    assert "INFO treadle.train.loop: resuming from step 40" in text
    assert "afterwards" not in text


def test_logging_is_cheap(make):
    names = "loss grad_norm lr tokens_per_second mfu memory_gib data_seconds forward_backward_seconds optimizer_seconds"
    metrics = {**dict.fromkeys(names.split(), 1.2345678), "tokens": 10**9, "flops": 1e18}
    batches = []
    with make() as run:
        for batch in range(20):
            began = time.perf_counter()
            for step in range(100):
                run.log(batch * 100 + step, metrics)
            batches.append((time.perf_counter() - began) / 100)
    assert min(batches) < 50e-6  # the least busy moment of a shared machine


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.floats() | st.integers(-(2**63), 2**63)))
def test_any_metrics_survive_the_disk(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    writer = LineWriter(path)
    writer.write(values)
    writer.close()
    (record,) = read_lines(path)
    assert repr(restore_floats(record)) == repr(values)


def test_a_run_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with Run.create(Path("runs"), "trial", {}, "") as run:
        assert run.folder == Path("runs") / run.id  # printed as the user wrote it
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.log(1, {"loss": 1.0})
    assert load_status(tmp_path / run.folder)["state"] == "finished"
