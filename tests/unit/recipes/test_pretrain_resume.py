"""A run that was killed, stopped or ran out of disk goes on as if nothing had happened: every loss, bit by bit."""

import random
import re
import shutil
import signal
import time

import pytest
from recipe_zoo import corpus, records, status, wait_for_steps, write_workplace

STEPS = 32
CASES = {
    "adamw": ["model.tied=true", "training.micro_batch_size=2"],
    "muon": ["optimizer.kind=muon", "training.micro_batch_size=1", "checkpoint.keep=1"],
    "muon-tied-bf16": ["optimizer.kind=muon", "model.tied=true", "training.precision=bf16", "checkpoint.keep_every=10"],
    "adamw-fp16": ["training.precision=fp16", "training.micro_batch_size=2"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, launcher):
    """With one whole run of each case, to compare with."""
    folder = tmp_path_factory.mktemp("resume")
    recipe = write_workplace(folder)
    processes = [
        launcher.start(folder, "train", recipe, f"folder={name}", f"training.steps={STEPS}", *changes)
        for name, changes in CASES.items()
    ]
    for name, process in zip(CASES, processes, strict=True):
        assert process.wait() == 0, process.output
        assert [record["step"] for record in records(folder / name)] == [*range(1, STEPS + 1)]
    return folder


@pytest.fixture(scope="module")
def killed_once(workplace, launcher):
    """A run of AdamW that was killed after some steps."""
    run = workplace / "killed"
    arguments = [f"folder={run.name}", f"training.steps={STEPS}", *CASES["adamw"]]
    process = launcher.start(workplace, "train", "recipe.yaml", *arguments)
    assert wait_for_steps(process, run, 8)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return run


@pytest.fixture
def killed(workplace, killed_once, request):
    """A copy of it, for one test."""
    return shutil.copytree(killed_once, workplace / re.sub(r"\W+", "-", request.node.name).strip("-"))


def assert_same_run(found, expected):
    """Every loss that was ever logged, by whichever of the processes, and the final weights, bit by bit."""
    right = {record["step"]: record for record in records(expected)}
    seen = records(found)
    assert {record["step"] for record in seen} == set(right)
    for record in seen:
        for key in ("loss", "grad_norm", "lr", "tokens", "flops"):
            assert record[key] == right[record["step"]][key], (record["step"], key)
    assert records(found, "evaluate")[-1]["loss"] == records(expected, "evaluate")[-1]["loss"]
    weights = "final/model.safetensors"
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    assert status(found)["state"] == "finished"


@pytest.mark.parametrize(
    ("case", "seed"),
    [("adamw", 0), ("adamw", 1), ("adamw", 2), ("muon", 0), ("muon", 1), ("muon-tied-bf16", 0), ("adamw-fp16", 0)],
)
def test_killed_at_random_moments(workplace, launcher, case, seed):
    generator = random.Random(f"{case} {seed}")
    run = workplace / f"{case}-{seed}"
    arguments = ["train", "recipe.yaml", f"folder={run.name}", f"training.steps={STEPS}", *CASES[case]]
    kills = 0
    for _ in range(2):
        process = launcher.start(workplace, *arguments)
        before = len(records(run))
        if wait_for_steps(process, run, before + generator.randint(1, STEPS // 2)):
            time.sleep(generator.uniform(0, 0.06))  # a checkpoint is under way most of the time
            process.send(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        arguments = ["train", "--resume", run.name]
    assert kills, "no process was killed while it trained"
    launcher.run(workplace, *arguments)
    assert_same_run(run, workplace / case)
    assert status(run)["resumes"] == 2
    assert not list((run / "checkpoints").glob(".*"))


def test_another_micro_batch_size_is_the_same_run_to_rounding(workplace, launcher, killed):
    run = killed
    launcher.run(workplace, "train", "--resume", run.name, "training.micro_batch_size=1")
    expected = {record["step"]: record["loss"] for record in records(workplace / "adamw")}
    found = {record["step"]: record["loss"] for record in records(run)}
    assert found.keys() == expected.keys()
    assert [found[step] for step in expected] == pytest.approx([*expected.values()], rel=2e-6)
    assert found != expected, "the sums are others"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(workplace, launcher, number):
    run = workplace / f"stopped-{number}"
    arguments = [f"folder={run.name}", f"training.steps={STEPS}", *CASES["adamw"], "checkpoint.every=null"]
    process = launcher.start(workplace, "train", "recipe.yaml", *arguments)
    assert wait_for_steps(process, run, 5)
    process.send(number)
    assert process.wait() == 0
    last = records(run)[-1]["step"]
    assert 5 <= last < STEPS
    assert status(run)["state"] == "interrupted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert f"stopped at step {last}; go on with: treadle train --resume {run.name}" in process.output
    assert f"{number.name}: stopping after this step" in (run / "log.txt").read_text()
    assert not (run / "final").exists()
    launcher.run(workplace, "train", "--resume", run.name)
    assert [record["step"] for record in records(run)] == [*range(1, STEPS + 1)], "no step twice, none left out"
    assert_same_run(run, workplace / "adamw")


def test_a_disk_that_is_full(workplace, launcher, killed):
    """Training outlives checkpoints that cannot be written; the last one may not be lost without a word."""
    run = killed
    before = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    output = launcher.run(workplace, "train", "--resume", run.name, largest_file=100_000, code=2)
    log = (run / "log.txt").read_text()
    assert len(re.findall(r"ERROR .* could not be saved: .*Earlier checkpoints are untouched", log)) > 3
    assert re.search(rf"error: {run.name}/checkpoints/step-{STEPS:08d}: could not be saved", output)
    assert "Traceback" not in output
    assert status(run)["state"] == "failed"
    assert records(run)[-1]["step"] == STEPS
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    launcher.run(workplace, "train", "--resume", run.name)
    assert_same_run(run, workplace / "adamw")


REFUSALS = {
    "architecture": (
        ["model.layers.0.feedforward.dim=96", "model.layers.0.mixer.heads=4"],
        r"checkpoints/step-\d+ holds another architecture \(model\.layers\[0\]\.mixer\.heads: 2 -> 4; "
        r"model\.layers\[0\]\.feedforward\.dim: 64 -> 96\)",
    ),
    "optimizer": (["optimizer.kind=muon"], r"step-\d+: cannot be loaded: .*optimizer\.state\.\S+momentum"),
    "row length": (
        ["training.sequence_length=16"],
        r"data\.sequence_length: the run was stopped with 32 and is resumed with 16",
    ),
    "seed": (["seed=1"], r"data\.seed: the run was stopped with 0 and is resumed with 1"),
    "batch": (["training.batch_size=2"], r"training\.batch_size: 2, but .*was made with batches of 4"),
    "split": (["data.held_out=0.3"], r"data\.datasets: the run was stopped with .* and is resumed with "),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_a_change_that_would_make_it_another_run_is_refused(workplace, launcher, killed, change):
    arguments, message = REFUSALS[change]
    output = launcher.run(workplace, "train", "--resume", killed.name, *arguments, code=2)
    assert re.search(f"error: .*{message}", output), output
    assert "Traceback" not in output


def test_changed_text_is_refused(workplace, launcher, killed):
    original = (workplace / "corpus.txt").read_text()
    try:
        (workplace / "corpus.txt").write_text(corpus(seed=5))
        output = launcher.run(workplace, "train", "--resume", killed.name, code=2)
    finally:
        (workplace / "corpus.txt").write_text(original)
    assert "error: data.datasets: the run was stopped with" in output


def test_a_damaged_checkpoint_is_a_message(workplace, launcher, killed):
    newest = max((killed / "checkpoints").glob("step-*"))
    tensors = newest / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    output = launcher.run(workplace, "train", "--resume", killed.name, code=2)
    assert f"error: {killed.name}/checkpoints/{newest.name}: cannot be loaded" in output
    assert "Traceback" not in output
    output = launcher.run(workplace, "generate", killed.name, code=2)
    assert f"error: {killed.name}/checkpoints/{newest.name}: cannot be loaded" in output
    shutil.rmtree(newest)  # what a person would do: go on with the one before
    launcher.run(workplace, "train", "--resume", killed.name)
    assert_same_run(killed, workplace / "adamw")


def test_without_a_checkpoint_it_starts_again(workplace, launcher, killed):
    shutil.rmtree(killed / "checkpoints")
    launcher.run(workplace, "train", "--resume", killed.name)
    assert "no complete checkpoint" in (killed / "log.txt").read_text()
    assert_same_run(killed, workplace / "adamw")


def test_one_process_at_a_time(workplace, launcher):
    run = workplace / "shared"
    first = launcher.start(workplace, "train", "recipe.yaml", f"folder={run.name}", "training.steps=2000")
    assert wait_for_steps(first, run, 2)
    second = launcher.run(workplace, "train", "--resume", run.name, code=2)
    third = launcher.run(workplace, "train", "recipe.yaml", f"folder={run.name}", code=2)
    first.send(signal.SIGINT)
    assert first.wait() == 0
    for output in (second, third):
        assert f"error: {run.name}: in use by the process with pid {first.pid}" in output
    fourth = launcher.run(workplace, "train", "recipe.yaml", f"folder={run.name}", code=2)
    assert f"error: {run.name}: holds a run already" in fourth


def test_a_finished_run_can_be_resumed_and_lengthened(workplace, launcher):
    run = workplace / "longer"
    constant = "schedule={kind: constant}"
    launcher.run(workplace, "train", "recipe.yaml", f"folder={run.name}", constant, "training.steps=5")
    launcher.run(workplace, "train", "--resume", run.name)
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5]
    launcher.run(workplace, "train", "--resume", run.name, "training.steps=9")
    whole = workplace / "long"
    launcher.run(workplace, "train", "recipe.yaml", f"folder={whole.name}", constant, "training.steps=9")
    assert_same_run(run, whole)
    output = launcher.run(workplace, "train", "--resume", run.name, "training.steps=3", code=2)
    assert "error: training.steps: 3, but" in output
