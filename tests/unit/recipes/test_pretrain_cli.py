"""The pretraining recipe from the command line and from Python: what it leaves behind, and what it refuses."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from recipe_zoo import corpus, recipe, records, status, wait_for_steps, write_workplace
from safetensors.torch import load_file

import treadle
from treadle import recipes
from treadle.errors import CheckpointError, ConfigError, RunError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, launcher):
    """With one finished run of four steps in `runs`."""
    folder = tmp_path_factory.mktemp("cli")
    recipe_file = write_workplace(folder)
    (folder / "first.txt").write_text(launcher.run(folder, "train", recipe_file.name))
    return folder


@pytest.fixture(scope="module")
def run(workplace):
    (folder,) = (workplace / "runs").glob("tiny-*")
    return folder


def test_the_run_folder(workplace, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["training"]["steps"] == 4
    assert config["training"]["clip_norm"] == 1.0, "defaults are written out"
    assert "torch" in json.dumps(json.loads((run / "environment.json").read_text()))
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    (evaluation,) = records(run, "evaluate")
    assert evaluation["step"] == 4
    (sample,) = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    assert sample["step"] == 4
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    weights = load_file(run / "final" / "model.safetensors")
    assert weights["embedding.weight"].shape == (320, 32), "257 tokens, up to a multiple of 64"
    assert (run / "training.png").read_bytes().startswith(PNG)
    assert status(run)["state"] == "finished"
    assert status(run)["summary"]["bits_per_byte"] == evaluation["bits_per_byte"]
    output = (workplace / "first.txt").read_text()
    assert f"held-out text: {evaluation['bits_per_byte']:.3f} bits per byte" in output
    assert "Warning" not in output


def test_losses_fall(run):
    losses = [record["loss"] for record in records(run)]
    assert losses[0] == pytest.approx(torch.tensor(320.0).log().item(), abs=0.1)
    assert losses[-1] < losses[0]


def test_the_saved_configuration_runs_again(workplace, launcher, run):
    launcher.run(workplace, "train", run / "config.yaml", "folder=again")
    again = workplace / "again"
    assert [r["loss"] for r in records(again)] == [r["loss"] for r in records(run)]
    first, second = (yaml.safe_load((f / "config.yaml").read_text()) for f in (run, again))
    assert {**first, "folder": "again"} == second


def test_load_gives_the_same_model_everywhere(workplace, launcher, run, tmp_path):
    process = launcher.start(workplace, "train", "recipe.yaml", "folder=unfinished", "training.steps=2000")
    assert wait_for_steps(process, workplace / "unfinished", 4)
    process.send(signal.SIGTERM)
    process.wait()
    (run / "final").rename(tmp_path / "elsewhere")
    try:
        from_checkpoint, _ = treadle.load(run, device="cpu")
    finally:
        (tmp_path / "elsewhere").rename(run / "final")
    tokens = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = from_checkpoint(tokens)
        for path in (run, run / "final", str(run)):
            model, tokenizer = treadle.load(path, device="cpu")
            assert not model.training
            assert torch.equal(model(tokens), expected)
            assert tokenizer.decode(tokenizer.encode("Grüße")) == "Grüße"
        by_id, _ = treadle.load(run.name, device="cpu", root=workplace / "runs")
        assert torch.equal(by_id(tokens), expected)
        unfinished, _ = treadle.load(workplace / "unfinished", device="cpu")
        assert unfinished(tokens).shape == expected.shape
        half, _ = treadle.load(run, device="cpu", dtype=torch.bfloat16)
        assert half(tokens).dtype == torch.bfloat16
        torch.testing.assert_close(half(tokens).float(), expected, rtol=0.05, atol=0.05)


def test_load_refuses_what_is_no_model(tmp_path, workplace):
    with pytest.raises(CheckpointError, match=r"holds neither final/model\.yaml, nor a config\.json, nor a complete"):
        treadle.load(tmp_path)
    with pytest.raises(RunError, match="no such run"):
        treadle.load("nothing", root=workplace / "runs")


def test_generate_prints_text(workplace, launcher, run):
    greedy = ["generate", "latest", "-p", "the ", "-n", 12, "-t", 0]
    first = launcher.run(workplace, *greedy)
    assert first.startswith("the ")
    assert launcher.run(workplace, *greedy) == first
    sampled = launcher.run(workplace, "generate", run, "-p", "the ", "-n", 5, "--samples", 3, "--top-k", 20)
    assert re.findall("--- sample (.)", sampled) == ["1", "2", "3"]
    assert sampled.count("the ") == 3
    model, tokenizer = treadle.load(run, device="cpu")
    (text,) = treadle.generate(model, tokenizer, "the ", max_new_tokens=12, temperature=0)
    assert "the " + text.rstrip("\ufffd") == first.rstrip("\n").rstrip("\ufffd")
    assert launcher.run(workplace, "generate", run, "-n", 3, "--top-p", 0.0) == launcher.run(
        workplace, "generate", run, "-n", 3, "-t", 0
    )


REFUSALS = {
    "vocabulary": (
        ["model.vocab_size=100"],
        "error: model.vocab_size: 100 is less than the tokenizer's 257 tokens; raise it to at least 257",
    ),
    "unknown key": (["training.stepz=3"], "Did you mean 'steps'?"),
    "unknown kind": (["optimizer.kind=adamv"], "unknown kind 'adamv'. Did you mean 'adamw'?"),
    "no such corpus": (["data.sources.0.paths=missing.txt"], "error: data source 'missing.txt': no such file"),
    "micro-batch": (["training.micro_batch_size=3"], "training.micro_batch_size: 3 does not divide batch_size=4"),
    "short corpus": (["data.sources.0.paths=short.txt", "data.held_out=0"], "less than one row of sequence_length + 1"),
    "empty corpus": (["data.sources.0.paths=empty.txt", "data.held_out=0"], "no document to train on"),
    "device": (["device=gpu"], "error: device: 'gpu'; expected auto, cpu, cuda or cuda:N"),
    "preset": (["preset=laptop"], "preset: unknown preset 'laptop'"),
    "attention": (["training.attention=flash"], "attention backend 'flash' cannot be used here: it runs on CUDA only"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_said_in_one_message(workplace, launcher, case):
    (workplace / "short.txt").write_text("ten bytes.")
    (workplace / "empty.txt").write_text("")
    arguments, message = REFUSALS[case]
    output = launcher.run(workplace, "train", "recipe.yaml", "folder=refused/" + case, *arguments, code=2)
    assert message in output
    assert "error: " in output
    assert "Traceback" not in output


def test_a_recipe_that_is_not_there(workplace, launcher):
    assert "error: " in launcher.run(workplace, "train", "nothing.yaml", code=2)
    assert "no such run" in launcher.run(workplace, "train", "--resume", "nothing", code=2)
    launcher.run(workplace, "train", code=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["separate documents", "one stream, nothing held out"])
def test_precisions_and_kinds_of_text(workplace, launcher, precision, source):
    changes = [] if source == "separate documents" else ["data.isolate_documents=false", "data.held_out=0"]
    name = f"{precision}-{len(changes)}"
    launcher.run(workplace, "train", "recipe.yaml", f"folder={name}", f"training.precision={precision}", *changes)
    losses = [record["loss"] for record in records(workplace / name)]
    assert losses[-1] < losses[0]
    weights = load_file(workplace / name / "final" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_presets(workplace, launcher):
    path = workplace / "presets.yaml"
    presets = {"cpu": {"training": {"steps": 2}}, "long": {"training": {"steps": 3}}}
    path.write_text(yaml.safe_dump(recipe(presets=presets, checkpoint={"every": None})))
    assert recipes.load(path).training.steps == 2  # type: ignore[attr-defined]
    assert recipes.load(path, preset="long").training.steps == 3  # type: ignore[attr-defined]
    assert recipes.load(path, ["training.steps=5"], "long").training.steps == 5  # type: ignore[attr-defined]
    launcher.run(workplace, "train", path, "--preset", "long", "folder=preset")
    assert [record["step"] for record in records(workplace / "preset")] == [1, 2, 3]


def test_resume_takes_an_id_or_latest(workplace, launcher):
    launcher.run(workplace, "train", "recipe.yaml", "root=others", "schedule.kind=constant", "training.steps=1")
    (other,) = (workplace / "others").glob("tiny-*")
    launcher.run(workplace, "train", "--resume", "latest", "--root", "others", "training.steps=2")
    launcher.run(workplace, "train", "--resume", other.name, "training.steps=3", "--root", "others")
    assert [record["step"] for record in records(other)] == [1, 2, 3]


def test_two_sources_are_evaluated_apart(workplace, launcher):
    (workplace / "second.txt").write_text(corpus(seed=9))
    second = {"kind": "text", "paths": "second.txt", "separator": "\n%\n"}
    path = workplace / "two.yaml"
    plain = recipe()
    plain["data"]["sources"].append(second)
    path.write_text(yaml.safe_dump(plain))
    launcher.run(workplace, "train", path, "folder=two", "evaluate.every=2", "evaluate.ngram=2")
    assert [record["step"] for record in records(workplace / "two", "evaluate/text-0")] == [2, 4]
    assert [record["step"] for record in records(workplace / "two", "evaluate/text-1")] == [2, 4]
    assert {"text-0_bits_per_byte", "text-1_bits_per_byte"} <= status(workplace / "two")["summary"].keys()


def test_build_from_a_mapping_a_recipe_and_a_file(workplace):
    spec = {**recipe()["model"], "vocab_size": 64}
    tokens = torch.arange(20)[None]
    path = workplace / "model.yaml"
    path.write_text(yaml.safe_dump(spec))
    with torch.no_grad():
        expected = treadle.build(spec, seed=3)(tokens)
        assert torch.equal(treadle.build({"model": spec}, seed=3)(tokens), expected)
        assert torch.equal(treadle.build(path, seed=3)(tokens), expected)
        assert torch.equal(treadle.build(workplace / "recipe.yaml", ["vocab_size=64"], seed=3)(tokens), expected)
        assert not torch.equal(treadle.build(spec, seed=4)(tokens), expected)
    assert treadle.build(spec, ["dim=64"]).embedding.weight.shape == (64, 64)
    with pytest.raises(ConfigError, match="Did you mean 'layers'"):
        treadle.build({**spec, "layerz": []})


def test_build_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        treadle.build(recipe()["model"])


OWN_BLOCK = """
from typing import Literal
from torch import nn
from treadle.nn.config import FeedForwardConfig
from treadle.nn.linear import Linear

class HalfConfig(FeedForwardConfig):
    kind: Literal["half"] = "half"

class Half(nn.Module):
    roles = {"map": "row"}

    def __init__(self, config, model_dim):
        super().__init__()
        self.map = Linear(model_dim, model_dim)

    def forward(self, x_BSD):
        return self.map(x_BSD) / 2
"""


def test_a_block_of_ones_own(workplace, launcher):
    """It trains, goes on, loads in another process from the weights or a checkpoint, and builds from the recipe."""
    (workplace / "blocks.py").write_text(OWN_BLOCK)
    plain = recipe(imports=["blocks.py"], training={**recipe()["training"], "steps": 2})
    plain["model"]["layers"][0]["feedforward"] = "half"
    path = workplace / "own.yaml"
    path.write_text(yaml.safe_dump(plain))
    launcher.run(workplace, "train", path, "folder=own")
    launcher.run(workplace, "train", "--resume", "own")
    text = launcher.run(workplace, "generate", "own", "-n", 4, "-t", 0)
    shutil.rmtree(workplace / "own" / "final")
    assert launcher.run(workplace, "generate", "own", "-n", 4, "-t", 0) == text
    code = "import sys, treadle; print(treadle.build(sys.argv[1], ['vocab_size=64']).layers['0'].feedforward)"
    built = subprocess.run(
        [sys.executable, "-c", code, path], cwd=workplace, capture_output=True, text=True, check=True
    )
    assert built.stdout.startswith("Half(")


def test_train_load_generate_from_python(workplace, monkeypatch):
    """`treadle.train` is a function and a package: importing from the one must not hide the other."""
    import treadle.train.loop

    monkeypatch.chdir(workplace)
    folder = treadle.run("recipe.yaml", ["folder=python", "training.steps=2"])
    assert folder == Path("python")
    assert treadle.run(resume=folder) == folder
    texts = treadle.generate(*treadle.load(folder, device="cpu"), "the ", samples=2, max_new_tokens=4)
    assert len(texts) == 2
    with pytest.raises(ValueError, match="give a recipe"):
        treadle.run()


def test_a_non_finite_loss_is_a_message_with_the_batch(workplace, launcher):
    options = ["optimizer.lr=1e30", "training.clip_norm=null", "training.steps=20", "optimizer.kind=sgd"]
    output = launcher.run(workplace, "train", "recipe.yaml", "folder=diverged", *options, code=2)
    assert re.search(r"error: step \d+: loss \S+, gradient norm \S+; the weights were not changed", output)
    (batch,) = (workplace / "diverged").glob("nonfinite-step-*.pt")
    assert str(batch.name) in output
    assert torch.load(batch)[0]["tokens"].shape == (4, 32)
    assert status(workplace / "diverged")["state"] == "failed"
