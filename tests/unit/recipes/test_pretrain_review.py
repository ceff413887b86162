"""What a resume must not break, and what must be refused before anything is trained."""

import json
from pathlib import Path

import pytest
import torch

import treadle
from treadle.errors import ConfigError, TreadleError
from treadle.tracking import load_samples

RECIPE = """
recipe: pretrain
name: small
model:
  dim: 32
  max_length: 32
  layers: [{kind: pre_norm, mixer: {kind: attention, heads: 2}, feedforward: {kind: gated, dim: 32}}]
data:
  sources: [{kind: text, paths: [corpus.txt], separator: "\\n\\n"}]
  tokenizer: bytes
  held_out: 0.2
training: {steps: 3, sequence_length: 16, batch_size: 2, precision: fp32, compile: false, log_every: 1}
sample: {max_new_tokens: 4}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"line {i} of a small text" for i in range(60)))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_refused_resume_leaves_the_run_as_it_was(recipe: Path) -> None:
    folder = treadle.run(recipe)
    before = (folder / "config.yaml").read_text()
    for change in ("model.dim=64", "training.batch_size=4", "seed=7", "training.steps=1", "optimizer=sgd"):
        with pytest.raises(TreadleError):
            treadle.run(resume=folder, overrides=[change])
        assert (folder / "config.yaml").read_text() == before, change
    assert treadle.run(resume=folder, overrides=["training.steps=5"]) == folder
    assert "steps: 5" in (folder / "config.yaml").read_text()


def test_a_key_that_a_later_version_adds_does_not_make_a_checkpoint_foreign(recipe: Path) -> None:
    folder = treadle.run(recipe)
    (facts_file,) = folder.glob("checkpoints/*/checkpoint.json")
    facts = json.loads(facts_file.read_text())
    del facts["model"]["layers"][0]["mixer"]["scale"]
    facts_file.write_text(json.dumps(facts))
    treadle.run(resume=folder, overrides=["training.steps=4", "model.init=fan_in"])


def test_the_last_step_is_saved_before_its_evaluation_can_fail(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("treadle.recipes.pretrain.log_evaluation", fail)
    with pytest.raises(MemoryError):
        treadle.run(recipe, ["folder=kept"])
    assert (Path("kept") / "checkpoints" / "step-00000003" / "checkpoint.json").is_file()


def test_a_run_goes_on_without_the_gpu_it_began_on(recipe: Path) -> None:
    folder = treadle.run(recipe)
    (facts_file,) = folder.glob("checkpoints/*/checkpoint.json")
    facts = json.loads(facts_file.read_text())
    facts["rng"]["cuda"] = facts["rng"]["cpu"]
    facts_file.write_text(json.dumps(facts))
    assert not torch.cuda.is_initialized()
    treadle.run(resume=folder, overrides=["training.steps=4"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.sequence_length=64", "training.sequence_length: 64 is more than model.max_length=32"),
        ("optimizer.betas=[0.9, 1.5]", r"optimizer.betas\[1\].*1.5"),
        ("evaluate.ngram=9", "evaluate.ngram.*9"),
        ("device=gpu", "device: 'gpu'"),
    ],
)
def test_refused_before_a_run_is_made(recipe: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        treadle.run(recipe, [change])
    assert not Path("runs").exists()


def test_evaluation_and_samples_can_be_switched_off(recipe: Path) -> None:
    folder = treadle.run(recipe, ["evaluate=null", "sample=null"])
    assert not load_samples(folder)
    assert "evaluate" not in {json.loads(line)["kind"] for line in (folder / "metrics.jsonl").open()}


def test_a_tied_model_comes_back_tied(recipe: Path) -> None:
    folder = treadle.run(recipe, ["model.tied=true"])
    model, _ = treadle.load(folder)
    assert model.head.weight is model.embedding.weight
    resumed = treadle.run(resume=folder, overrides=["training.steps=4"])
    again, _ = treadle.load(resumed)
    assert again.head.weight is again.embedding.weight
