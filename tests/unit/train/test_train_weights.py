"""Runs that start from weights: published, a model folder's, a run's."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from treadle.config import resolve
from treadle.errors import CheckpointError, ConfigError
from treadle.nn.store import save_model
from treadle.nn.transformer import TransformerConfig
from treadle.recipes.task import RecipeConfig
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig, TrainingConfig
from treadle.train.optimizers import AdamWConfig
from treadle.train.setup import build_model, build_state
from treadle.train.weights import fingerprint, load_weights, spec_of

LAYER = {
    "kind": "pre_norm",
    "repeat": 2,
    "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "gated", "dim": 48},
}
SPEC = {"dim": 32, "vocab_size": 64, "max_length": 64, "layers": [LAYER]}
TRAINING = TrainingConfig(steps=1, sequence_length=16, batch_size=2, precision="fp32", compile=False)


def model(seed=0, **changes):
    return build_model(resolve(TransformerConfig, {**SPEC, **changes}), TRAINING, seed=seed)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    theirs = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    ).eval()
    theirs.save_pretrained(folder)
    return folder, theirs


def test_published_weights_give_their_logits(published):
    folder, theirs = published
    ours = build_model(spec_of(folder), TRAINING, seed=3)
    load_weights(ours, folder)
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_folders_and_runs_give_their_own_weights(tmp_path):
    source = model(1)
    save_model(source, tmp_path / "folder")
    state = build_state(source, AdamWConfig(), TRAINING)
    checkpoints = Checkpointer(tmp_path / "run" / "checkpoints", CheckpointConfig())
    checkpoints.save(state, {"model": SPEC}, wait=True)
    for path in (tmp_path / "folder", tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000000"):
        target = model(2)
        load_weights(target, path)
        assert all(map(torch.equal, target.parameters(), source.parameters())), path
        assert spec_of(path) == source.config


def test_what_does_not_fit_is_named(published, tmp_path):
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn.*|missing"):
        load_weights(model(layers=[{**LAYER, "repeat": 3}]), published[0])
    with pytest.raises(CheckpointError, match=r"embed_tokens.* in the model, 64x32 in the file"):
        load_weights(model(vocab_size=80), published[0])
    with pytest.raises(CheckpointError, match="no folder"):
        load_weights(model(), tmp_path / "nowhere")


def test_another_fact_is_told(published, caplog):
    load_weights(model(layers=[{**LAYER, "mixer": {**LAYER["mixer"], "window": 7}}]), published[0])
    assert "window" in caplog.text


def test_a_fingerprint_is_of_the_content(tmp_path):
    source = model(1)
    one, other = save_model(source, tmp_path / "one"), save_model(source, tmp_path / "other")
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        source.norm.weight[0] += 1
    save_model(source, other)
    assert fingerprint(one) != fingerprint(other)


def recipe(weights, **changes):
    task = {"kind": "mqar", "pairs": 2, "vocab_size": 64}
    training = {"steps": 1, "sequence_length": 16, "batch_size": 2, "precision": "fp32", "compile": False}
    return {"recipe": "task", "weights": str(weights), "task": task, "training": training, **changes}


def test_a_recipe_takes_the_model_from_its_weights(published):
    config = resolve(RecipeConfig, recipe(published[0]))
    assert config.model == spec_of(published[0])
    with pytest.raises(ConfigError, match="model"):
        resolve(RecipeConfig, {**recipe(published[0]), "weights": None})
