"""The task recipe: it learns, it goes on exactly where it stopped, and it says what is wrong."""

from dataclasses import replace

import pytest
import torch
import yaml
from recipe_zoo import records, status

import treadle
from treadle import recipes
from treadle.config import resolve
from treadle.data.tasks import MQARConfig, TaskBatches
from treadle.errors import CheckpointError, ConfigError, DataError
from treadle.evaluate.accuracy import evaluate_accuracy
from treadle.nn.store import load_model
from treadle.nn.transformer import TransformerConfig


def write_recipe(folder, **changes):
    layer = {
        "kind": "pre_norm",
        "repeat": 2,
        "mixer": {"kind": "attention", "heads": 2, "position": None},
        "feedforward": {"kind": "gated", "dim": 64},
    }
    training = {"steps": 8, "sequence_length": 16, "batch_size": 8, "precision": "fp32", "compile": False}
    plain = {
        "recipe": "task",
        "device": "cpu",
        "task": {"kind": "mqar", "pairs": 3, "vocab_size": 16},
        "model": {"dim": 32, "max_length": 16, "position": "learned", "layers": [layer]},
        "training": {**training, "log_every": 1},
        "optimizer": {"kind": "muon", "lr": 1e-2},
        "schedule": {"kind": "constant", "warmup": 2},
        "checkpoint": {"every": 3},
        "evaluate": {"samples": 50},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**plain, **changes}))
    return path


def test_it_learns_to_recall(tmp_path):
    changes = ["training.steps=200", "training.batch_size=32", "training.log_every=50", "evaluate.samples=500"]
    folder = treadle.run(write_recipe(tmp_path), [*changes, f"folder={tmp_path / 'run'}", "schedule=cosine"])
    losses = [record["loss"] for record in records(folder)]
    assert losses[-1] < losses[0] / 10
    (evaluation,) = records(folder, "evaluate")
    assert evaluation["accuracy"] > 0.95
    assert status(folder)["summary"] == {"3_pairs_accuracy": evaluation["accuracy"]}
    assert accuracy_by_hand(folder, recipes.load(folder / "config.yaml")) == evaluation["accuracy"]


def accuracy_by_hand(folder, config):
    """Row by row: the likeliest token after each query."""
    model = load_model(folder / "final")
    batches = TaskBatches(config.task, sequence_length=16, batch_size=1, held_out=True)
    right = asked = 0
    for row in range(config.evaluate.samples):
        batch = batches.batch(row)
        with torch.no_grad():
            answers = model(batch.tokens_BS)[0].argmax(-1).tolist()
        for answer, target in zip(answers, batch.targets_BS[0].tolist(), strict=True):
            if target != -100:
                right, asked = right + (answer == target), asked + 1
    return right / asked


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    recipe = write_recipe(tmp_path)
    whole = treadle.run(recipe, [f"folder={tmp_path / 'whole'}"])
    half = treadle.run(recipe, [f"folder={tmp_path / 'half'}", "training.steps=5"])
    treadle.run(overrides=["training.steps=8", "training.micro_batch_size=8"], resume=half)
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [r[key] for r in records(half)] == [r[key] for r in records(whole)]
    weights = "final/model.safetensors"
    assert (half / weights).read_bytes() == (whole / weights).read_bytes()
    assert status(half)["resumes"] == 1
    with pytest.raises(DataError, match=r"data\.task: the run was stopped with .* and is resumed with"):
        treadle.run(overrides=["task.pairs=2"], resume=half)
    with pytest.raises(CheckpointError, match="holds another architecture"):
        treadle.run(overrides=["model.layers.0.feedforward.dim=96"], resume=half)
    model, tokenizer = treadle.load(half)
    assert tokenizer is None
    with pytest.raises(DataError, match="the model has no tokenizer"):
        treadle.generate(model, tokenizer)


def test_numbers_of_pairs_are_scored_apart(tmp_path):
    changes = ["training.steps=1", "evaluate.samples=5", "task.pairs=[1, 3]", f"folder={tmp_path / 'run'}"]
    folder = treadle.run(write_recipe(tmp_path), changes)
    assert set(status(folder)["summary"]) == {"1_pairs_accuracy", "3_pairs_accuracy"}
    for pairs in (1, 3):
        (record,) = records(folder, f"evaluate/{pairs}_pairs")
        assert record["accuracy"] * 5 * pairs == pytest.approx(round(record["accuracy"] * 5 * pairs))


SILENT = """
from typing import Literal

import numpy as np

from treadle.data.tasks import Draws, TaskConfig


class SilentConfig(TaskConfig):
    kind: Literal["silent"] = "silent"
    asks: bool = False

    def parts(self) -> dict[str, TaskConfig]:
        return {"speaking": SilentConfig(asks=True), "no_answers": self}

    def rows(self, samples_B: np.ndarray, length: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        tokens_BS = np.zeros((len(samples_B), length), dtype=np.int64)
        targets_BS = np.full_like(tokens_BS, -100)
        targets_BS[samples_B == 99] = 1 if self.asks else -100
        return tokens_BS, targets_BS
"""


def test_a_task_without_answers_is_refused_before_training(tmp_path):
    (tmp_path / "silent.py").write_text(SILENT)
    changes = {"imports": ["silent.py"], "task": "silent", "evaluate": {"samples": 100}}
    with pytest.raises(ConfigError, match="task: none of the 100 held-out rows of no answers has a target"):
        treadle.run(write_recipe(tmp_path, **changes), [f"folder={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_accuracy_of_no_answer_is_an_error():
    model = make_model()
    rows = TaskBatches(MQARConfig(pairs=2, vocab_size=16), sequence_length=16, batch_size=2).batch(0)
    silent = replace(rows, targets_BS=torch.full_like(rows.targets_BS, -100), valid_tokens=0)
    with pytest.raises(ValueError, match="no row has a target to answer"):
        evaluate_accuracy(model, [silent])
    assert evaluate_accuracy(model, [silent, rows]).answers == 4


def make_model():
    layer = {"kind": "pre_norm", "mixer": {"kind": "attention", "heads": 2}, "feedforward": {"kind": "dense", "dim": 8}}
    spec = {"dim": 16, "vocab_size": 16, "max_length": 16, "layers": [layer]}
    return resolve(TransformerConfig, spec).build().initialise(0)


def test_the_vocabulary_is_the_tasks(tmp_path):
    folder = treadle.run(write_recipe(tmp_path), ["training.steps=1", f"folder={tmp_path / 'run'}"])
    assert load_model(folder / "final").head.weight.shape == (64, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.pairs=5", r"task\.pairs: 5 pairs and as many queries need rows of 20 tokens, not 16"),
        ("task.pairs=[2, 2]", r"task\.pairs: \[2, 2\]; expected different numbers, at least one"),
        ("task.pairs=[]", r"task\.pairs: \[\]; expected different numbers, at least one"),
        ("task.pairs=[2, 0]", r"task\.pairs"),
        ("task.vocab_size=6", r"task\.vocab_size: 6 has too few keys for 3 pairs; raise it to 8"),
        ("model.vocab_size=15", r"model\.vocab_size: 15 is less than task\.vocab_size=16"),
        ("task=mqra", r"task: unknown kind 'mqra'\. Did you mean 'mqar'\?"),
        ("training.sequence_length=17", r"training\.sequence_length: 17 is more than model\.max_length=16"),
        ("evaluate.samples=0", r"evaluate\.samples"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        recipes.load(write_recipe(tmp_path), [change])
