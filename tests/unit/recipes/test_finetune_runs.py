"""Fine-tuning as a run: small checkpoints, an exact resume, and a model folder at the end."""

import json
import shutil

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader

import treadle
from treadle.config import resolve
from treadle.errors import CheckpointError, ConfigError
from treadle.nn.store import load_model, save_model
from treadle.nn.transformer import TransformerConfig
from treadle.tracking.read import load_metrics
from treadle.train.adapters import load_adapter, merge_adapter

LAYER = {
    "kind": "pre_norm",
    "repeat": 2,
    "mixer": {"kind": "attention", "heads": 2},
    "feedforward": {"kind": "gated", "dim": 32},
}
SPEC = {"dim": 16, "vocab_size": 64, "max_length": 32, "layers": [LAYER]}
METHODS = {
    "lora": {"rank": 2, "dropout": 0.1, "lr_ratio": 4.0, "trainable": ["norm"]},
    "pissa": {"rank": 2, "init": "pissa"},
    "dora": {"method": "dora", "rank": 2},
    "adapter": {"method": "adapter", "rank": 2},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = resolve(TransformerConfig, SPEC).build().initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return save_model(model, tmp_path_factory.mktemp("weights"))


def recipe(folder, weights, method, **changes):
    raw = {
        "recipe": "task",
        "root": str(folder / "runs"),
        "device": "cpu",
        "weights": weights and str(weights),
        "finetune": METHODS[method],
        "task": {"kind": "mqar", "pairs": 2, "vocab_size": 64},
        "training": {"steps": 4, "sequence_length": 16, "batch_size": 4, "precision": "fp32", "compile": False}
        | {"activation_checkpointing": "full", "log_every": 1},
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "evaluate": {"samples": 8},
        "checkpoint": {"every": 2, "keep": 5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_it_resumes_to_the_bit_and_ends_with_one_model(method, weights, tmp_path):
    run = treadle.run(recipe(tmp_path, weights, method))
    losses = load_metrics(run, kind="train")["loss"]
    learned = (run / "adapter" / "adapter.safetensors").read_bytes()
    original = load_model(weights)
    kept = FileSystemReader(run / "checkpoints" / "step-00000002").read_metadata().state_dict_metadata
    frozen = {name for name, _ in original.named_parameters() if name != "norm.weight"}
    assert any("updates" in key for key in kept)
    assert not [key for key in kept if any(name in key for name in frozen)]
    beside = load_adapter(load_model(weights), run)
    tokens = torch.randint(64, (2, 8))
    with torch.no_grad():
        assert (beside(tokens) - original(tokens)).abs().max() > 1e-3
        if method == "adapter":
            assert not (run / "final").exists()
        else:
            torch.testing.assert_close(load_model(run / "final")(tokens), beside(tokens), atol=1e-5, rtol=0)
            merge_adapter(run, tmp_path / "merged")
            merged = (tmp_path / "merged" / "model.safetensors").read_bytes()
            assert merged == (run / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    again = treadle.run(resume=run)
    assert load_metrics(again, kind="train")["loss"][-2:] == losses[-2:]
    assert (again / "adapter" / "adapter.safetensors").read_bytes() == learned


def test_other_weights_are_refused(weights, tmp_path):
    mine = tmp_path / "weights"
    shutil.copytree(weights, mine)
    run = treadle.run(recipe(tmp_path, mine, "lora"))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    with pytest.raises(CheckpointError, match=r"finetune\.rank: 2 -> 3"):
        treadle.run(overrides=["finetune.rank=3"], resume=run)
    changed = load_model(mine)
    with torch.no_grad():
        changed.norm.weight.add_(1)
    save_model(changed, mine)
    with pytest.raises(CheckpointError, match="other weights"):
        treadle.run(resume=run)
    with pytest.raises(CheckpointError, match="other weights"):
        merge_adapter(run, tmp_path / "merged")
    facts = json.loads((run / "checkpoints" / "step-00000002" / "checkpoint.json").read_text())
    assert facts["adapter"]["finetune"]["rank"] == 2


def test_a_run_of_all_weights_starts_from_them(weights, tmp_path):
    path = recipe(tmp_path, weights, "lora", finetune={"method": "full"}, optimizer={"kind": "adamw", "lr": 1e-9})
    run = treadle.run(path, ["optimizer.weight_decay=0"])
    for (name, found), expected in zip(
        load_model(run / "final").named_parameters(), load_model(weights).parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=name)


def test_what_does_not_go_together_is_refused(weights, tmp_path):
    with pytest.raises(ConfigError, match=r"weights: .*finetune.*needs some"):
        treadle.run(recipe(tmp_path, None, "lora", model=SPEC))
    with pytest.raises(ConfigError, match=r"finetune\.lr_ratio: 4\.0, which muon does not know"):
        treadle.run(recipe(tmp_path, weights, "lora", optimizer={"kind": "muon"}))
