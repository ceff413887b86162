"""A whole recipe on several processes: the losses of one, whoever is stopped, killed or stuck."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from distributed_zoo import layer
from harness import RankFailed, run
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from treadle import recipes
from treadle.config import resolve
from treadle.errors import TrainingError
from treadle.parallel.launch import _failure
from treadle.train.loop import Loop

STEPS = 6
HOUSE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A recipe, its corpus, and the run of one process in `one`."""
    folder = tmp_path_factory.mktemp("together")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "my", "dog", "ran", "over"]
    texts = [" ".join(words[(i * j) % 11] for j in range(5 + i % 30)) for i in range(60)]
    (folder / "corpus.txt").write_text("\n%\n".join(texts))
    recipe = {
        "recipe": "pretrain",
        "name": "tiny",
        "device": "cpu",
        "model": {"dim": 32, "max_length": 64, "layers": [layer()]},
        "data": {
            "sources": [{"kind": "text", "paths": "corpus.txt", "separator": "\n%\n"}],
            "tokenizer": "bytes",
            "held_out": 0.1,
            "workers": 1,
            "cache": "cache",
        },
        "training": {
            "steps": STEPS,
            "sequence_length": 32,
            "batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "compile": False,
            "log_every": 1,
        },
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "checkpoint": {"every": 2},
        "evaluate": {"every": 3},
        "sample": {"every": 3, "max_new_tokens": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    here = os.getcwd()
    os.chdir(folder)
    recipes.main(recipes.load("recipe.yaml", ["folder=one"]))
    os.chdir(here)
    return folder


def train(folder: Path, run_folder: str, changes: list[str], resume: bool = False, stop: tuple[int, int] | None = None):
    """One rank of a run. stop: the rank that asks to stop, during which step."""
    os.chdir(folder)
    step = Loop._step

    def interrupting(self, batches):
        if stop == (self.mesh.rank, self.state.step + 1):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    Loop._step = interrupting
    if resume:
        recipes.main(recipes.load(f"{run_folder}/config.yaml", changes), resume=Path(run_folder))
    else:
        recipes.main(recipes.load("recipe.yaml", [f"folder={run_folder}", *changes]))


def records(run_folder: Path, kind: str = "train"):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_same_run(found: Path, expected: Path):
    assert [r["step"] for r in records(found)] == [*range(1, STEPS + 1)]
    for mine, right in zip(records(found), records(expected), strict=True):
        assert mine["tokens"] == right["tokens"]
        assert mine["loss"] == pytest.approx(right["loss"], abs=2e-6)
        assert mine["grad_norm"] == pytest.approx(right["grad_norm"], abs=5e-6)
    for mine, right in zip(records(found, "evaluate"), records(expected, "evaluate"), strict=True):
        assert mine["bits_per_byte"] == pytest.approx(right["bits_per_byte"], abs=5e-6)
    weights, right = (load_file(run / "final" / "model.safetensors") for run in (found, expected))
    assert weights.keys() == right.keys()
    for name, values in right.items():
        assert (weights[name] - values).abs().max() < 2e-5, name
    assert (found / "samples.jsonl").read_text().count("\n") == 2


def test_the_losses_of_one_process(workplace):
    run(train, 2, workplace, "two", [])
    assert_same_run(workplace / "two", workplace / "one")


def test_one_is_asked_to_stop_and_others_go_on(workplace):
    """Two processes, of which one gets the signal; resumed by four in another layout."""
    run(train, 2, workplace, "stopped", [], False, (1, 3))
    status = json.loads((workplace / "stopped/status.json").read_text())
    assert status["state"] == "interrupted"
    assert [r["step"] for r in records(workplace / "stopped")] == [1, 2, 3]
    run(train, 4, workplace, "stopped", ["parallel.replicate=2"], True)
    assert_same_run(workplace / "stopped", workplace / "one")


def test_a_pipeline_stops_and_goes_on_sharded(workplace):
    """Evaluation, samples, checkpoints and the final weights come from all stages."""
    run(train, 2, workplace, "staged", ["parallel.pipeline=2", "optimizer.lr=0.003"], False, (1, 3))
    assert [r["step"] for r in records(workplace / "staged")] == [1, 2, 3]
    run(train, 4, workplace, "staged", ["parallel.schedule=gpipe"], True)
    assert_same_run(workplace / "staged", workplace / "one")
    for mine, right in zip(records(workplace / "staged"), records(workplace / "one"), strict=True):
        assert mine["flops"] == right["flops"]


def recall(folder: Path, run_folder: str, parallel: dict[str, object] | None = None):
    os.chdir(folder)
    recipe = {
        "recipe": "task",
        "device": "cpu",
        "folder": run_folder,
        "task": {"kind": "mqar", "pairs": 4, "vocab_size": 64},
        "model": {"dim": 32, "max_length": 64, "layers": [layer()]},
        "training": {"steps": 3, "sequence_length": 32, "batch_size": 8, "precision": "fp32", "compile": False},
        "evaluate": {"samples": 21},
        "parallel": parallel or {},
    }
    recipes.main(resolve(recipes.schema("task"), recipe))


def test_a_task_is_answered_together(workplace):
    """21 samples are not shared out equally: the last process keeps the others company."""
    for ranks in (1, 4):
        run(recall, ranks, workplace, f"recall-{ranks}")
    run(recall, 2, workplace, "recall-staged", {"pipeline": 2, "schedule": "gpipe"})
    staged = records(workplace / "recall-staged", "evaluate")[0]
    assert staged["accuracy"] == records(workplace / "recall-1", "evaluate")[0]["accuracy"]
    one, four = (records(workplace / f"recall-{ranks}", "evaluate")[0] for ranks in (1, 4))
    assert four["accuracy"] == one["accuracy"]
    assert four["row_accuracy"] == one["row_accuracy"]


def diverge(folder: Path):
    import treadle.recipes.pretrain as pretrain

    plain = pretrain.training_loss

    def broken(training):
        def function(model, batch):
            loss = plain(training)(model, batch)
            return type(loss)(loss.total * (float("nan") if os.environ["RANK"] == "1" else 1.0))

        return function

    pretrain.training_loss = broken
    try:
        train(folder, "diverged", [])
    except TrainingError as error:
        return str(error)


def test_a_loss_that_is_not_finite_on_one_stops_all(workplace):
    messages = run(diverge, 2, workplace)
    assert all("step 1: loss nan" in message for message in messages)
    assert len(list((workplace / "diverged").glob("nonfinite-step-1-rank-*.pt"))) == 2
    assert json.loads((workplace / "diverged/status.json").read_text())["state"] == "failed"


def get_stuck(folder: Path):
    import treadle.parallel.watchdog as watchdog

    watchdog.GRACE = 0.5
    step = Loop._step

    def sleeping(self, batches):
        if self.mesh.rank == 1 and self.state.step == 2:
            time.sleep(1000)
        return step(self, batches)

    Loop._step = sleeping
    train(folder, "stuck", ["parallel.timeout=2", "sample=null", "evaluate=null"])


def test_what_is_stuck_is_written_and_ended(workplace):
    with pytest.raises(RankFailed, match="exit code 75"):
        run(get_stuck, 2, workplace)
    first, second = (workplace / "stuck" / f"stacks-rank-0000{rank}.txt" for rank in (0, 1))
    assert "sum_counts" in first.read_text(), "one waits for the other"
    assert "sleeping" in second.read_text()


class Command:
    """`treadle` as one starts it, with the processes that it starts."""

    def __init__(self, folder: Path, *arguments: str):
        paths = os.pathsep.join(filter(None, [str(HOUSE), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "treadle", *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ranks(self) -> list[int]:
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task").glob("*/children")
        return sorted(int(child) for file in found for child in file.read_text().split())

    def wait_for_steps(self, run_folder: Path, count: int) -> None:
        deadline = time.monotonic() + 60
        file = run_folder / "metrics.jsonl"
        while not file.exists() or file.read_text().count('"kind":"train"') < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.process.communicate()[0])
            time.sleep(0.02)

    def end(self, seconds: float = 30) -> tuple[int, str]:
        try:
            output = self.process.communicate(timeout=seconds)[0]
        finally:
            self.process.kill()
        return self.process.returncode, output


def test_the_command(workplace):
    """Ctrl-C saves and stops all; one that is killed takes the others with it at once, and is named."""
    changes = ["training.steps=100000", "checkpoint.every=5", "evaluate=null", "sample=null"]
    command = Command(workplace, "train", "recipe.yaml", "folder=command", *changes, "--nproc", "2")
    command.wait_for_steps(workplace / "command", 7)
    command.process.send_signal(signal.SIGINT)
    code, output = command.end()
    assert code == 0, output
    status = json.loads((workplace / "command/status.json").read_text())
    assert status["state"] == "interrupted", output
    done = len(records(workplace / "command"))

    command = Command(workplace, "train", "--resume", "command", "--nproc", "2")
    command.wait_for_steps(workplace / "command", done + 5)
    ranks = command.ranks()
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    code, output = command.end()
    assert time.monotonic() - began < 15
    assert code == 2
    assert "was killed by SIGKILL" in output
    assert "treadle train --resume latest" in output
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    steps = [record["step"] for record in records(workplace / "command")]
    assert steps == [*range(1, steps[-1] + 1)], "every step once"


def failed(*failures: tuple[int, float]) -> ChildFailedError:
    """What the launcher is told: of each rank, exit code and seconds after the first."""
    found = {}
    for rank, (code, after) in enumerate(failures):
        found[rank] = ProcessFailure(rank, 1000 + rank, code, "")
        found[rank].timestamp = int(1_000_000 + after)
    return ChildFailedError("treadle", found)


def test_who_does_not_end_is_not_the_cause(capsys):
    """Rank 1 fails; rank 0, in a call that no signal ends, is killed 30 s later. Another time rank 0 is killed first,
    and is noticed a second after the others have missed it."""
    late = _failure(failed((-signal.SIGKILL, 30), (1, 0), (-signal.SIGTERM, 0)))
    assert isinstance(late, SystemExit)
    assert "rank 1 ended first, with exit code 1" in capsys.readouterr().err
    assert "rank 0 was killed by SIGKILL" in str(_failure(failed((-signal.SIGKILL, 1), (1, 0))))


def test_sizes_are_refused_before_anything_starts(workplace):
    from typer.testing import CliRunner

    from treadle import cli

    recipe = str(workplace / "recipe.yaml")
    result = CliRunner().invoke(cli.app, ["train", recipe, "--nproc", "3"])
    assert result.exit_code == 2
    assert "8 rows cannot be shared out equally" in result.output
    assert torch.distributed.is_initialized() is False
