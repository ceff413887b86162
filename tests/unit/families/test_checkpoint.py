"""Published checkpoints that do not fit, shards, and how much is in memory at a time."""

import json
import re
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle.config import resolve
from treadle.errors import CheckpointError, ConfigError
from treadle.families import checkpoint
from treadle.families.family import ORDER, Family, families, find, fitting, unrolled
from treadle.nn.store import load_model
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import INDEX_FILE, WEIGHTS_FILE, WeightsReader, WeightsWriter

LAYER: dict[str, Any] = {
    "kind": "pre_norm",
    "repeat": 3,
    "norm": {"kind": "rms", "eps": 1e-6},
    "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "gated", "dim": 24},
}
SPEC = {"dim": 16, "vocab_size": 50, "max_length": 32, "layers": [LAYER], "norm": {"kind": "rms", "eps": 1e-6}}


def build(**changes: Any) -> Transformer:
    model: Transformer = resolve(TransformerConfig, {**SPEC, **changes}).build()
    return model.initialise(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(build(), tmp_path, family="llama")
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of the config.json; a value of None takes the key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_every_problem_of_the_tensors_is_listed_once(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    for i in range(3):
        tensors[f"model.layers.{i}.mlp.gates_proj.weight"] = tensors.pop(f"model.layers.{i}.mlp.gate_proj.weight")
    tensors["model.norm.weight"] = torch.zeros(17)
    tensors["model.extra"] = torch.zeros(2, 3)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing model.layers.{0-2}.mlp.gate_proj.weight [24 x 16] (3 tensors);"
        " Did you mean 'model.layers.0.mlp.gates_proj.weight'?",
        "left over model.extra [2 x 3]",
        "left over model.layers.{0-2}.mlp.gates_proj.weight [24 x 16] (3 tensors)",
        "model.norm.weight [16] in the model, 17 in the file",
    ]


def test_a_key_without_a_rule_is_refused_unless_it_is_off(folder: Path) -> None:
    edit(folder, clip_qkv=8.0, use_magic=False)
    with pytest.raises(CheckpointError, match=r"'llama' does not understand clip_qkv=8\.0, and computing without it"):
        checkpoint.load(folder)


def test_a_missing_key_and_a_wrong_value_name_themselves(folder: Path) -> None:
    edit(folder, num_attention_heads=None)
    with pytest.raises(CheckpointError, match=r"lacks the key 'num_attention_heads'\. Did you mean"):
        checkpoint.load(folder)
    edit(folder, num_attention_heads=4, hidden_act="snake")
    with pytest.raises(CheckpointError, match="unknown activation 'snake'"):
        checkpoint.load(folder)
    edit(folder, hidden_act="silu", rope_scaling={"rope_type": "spiral"}, rope_parameters={})
    with pytest.raises(CheckpointError, match="unknown type 'spiral'"):
        checkpoint.load(folder)
    edit(folder, rope_scaling={"rope_type": "linear", "factor": 2.0, "twist": 1})
    with pytest.raises(CheckpointError, match="type 'linear' has no 'twist'"):
        checkpoint.load(folder)


def test_an_unknown_family_tells_the_nearest_and_what_it_would_not_understand(folder: Path) -> None:
    edit(folder, model_type="lama", new_trick=3)
    with pytest.raises(CheckpointError, match=r"unknown family 'lama'\. Did you mean 'llama'\?") as caught:
        checkpoint.load(folder)
    assert "does not understand: new_trick" in str(caught.value)
    assert "docs/families.md" in str(caught.value)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        checkpoint.load(folder)


def test_damage_is_named(folder: Path) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        checkpoint.load(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        checkpoint.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        checkpoint.load(folder)


def test_a_model_that_the_family_cannot_say_is_refused_with_every_difference(tmp_path: Path) -> None:
    model = build(softcap=30.0, layers=[{**LAYER, "mixer": {**LAYER["mixer"], "window": 8, "sinks": True}}])
    with pytest.raises(ConfigError, match="no 'llama', which could not say all of it") as caught:
        checkpoint.save(model, tmp_path, family="llama")
    for line in ("layers[2].mixer.window: 8 here, None there", "softcap: 30.0 here, None there", "mixer.sinks: True"):
        assert line in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no family can say all of this model"):
        checkpoint.save(model, tmp_path)
    with pytest.raises(ConfigError, match=r"unknown family 'lamma'\. Did you mean"):
        checkpoint.save(model, tmp_path, family="lamma")


def test_shards_are_written_and_read_and_replace_what_was_there(folder: Path) -> None:
    before = load_file(folder / WEIGHTS_FILE)
    model = checkpoint.load(folder)
    checkpoint.save(model, folder, family="llama", shard_bytes=4000)
    index = json.loads((folder / INDEX_FILE).read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 2
    assert not (folder / WEIGHTS_FILE).exists()
    assert {p.name for p in folder.glob("*.safetensors")} == files
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in before.values())
    again = checkpoint.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (folder / sorted(files)[1]).unlink()
    with pytest.raises(CheckpointError, match=f"tensors of {sorted(files)[1]} are not there"):
        checkpoint.load(folder)


def test_a_failed_write_leaves_what_was_there(folder: Path) -> None:
    before = (folder / WEIGHTS_FILE).read_bytes()

    def write() -> None:
        with WeightsWriter(folder, shard_bytes=64) as writer:
            writer.add("a", torch.zeros(100))
            writer.add("b", torch.zeros(100))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", WEIGHTS_FILE]


def test_few_tensors_are_in_memory_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    read = WeightsReader.tensor

    def counted(self: WeightsReader, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(WeightsReader, "tensor", counted)
    checkpoint.load(folder)
    assert most <= 4, "the pieces of one parameter, and the last one of the parameter before"
    checkpoint.convert(folder, tmp_path / "ours")
    assert most <= 4


def test_a_bare_model_without_prefix_is_read(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(folder, tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    model = checkpoint.load(folder)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"])


def test_find_returns_the_registered_family() -> None:
    assert find({"model_type": "llama"}) is Family.registry["llama"]


@pytest.fixture
def shards(folder: Path) -> Path:
    checkpoint.save(checkpoint.load(folder), folder, family="llama", shard_bytes=4000)
    return folder


def test_the_index_says_which_shards_there_are(shards: Path) -> None:
    before = checkpoint.load(shards)
    index = json.loads((shards / INDEX_FILE).read_text())
    save_file({"junk": torch.zeros(2)}, shards / "model-00001-of-00002.safetensors")  # left by an earlier download
    for name in {*index["weight_map"].values()}:
        (shards / name).rename(shards / f"weights.{name[6:11]}.safetensors")
    index["weight_map"] = {key: f"weights.{name[6:11]}.safetensors" for key, name in index["weight_map"].items()}
    (shards / INDEX_FILE).write_text(json.dumps(index))
    again = checkpoint.load(shards)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a": "mod', "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../a.safetensors"}}']
)
def test_an_index_that_is_none_is_named(shards: Path, text: str) -> None:
    (shards.parent / "a.safetensors").write_bytes(b"")
    (shards / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        checkpoint.load(shards)
    model = build()
    checkpoint.save(model, shards, family="llama")  # and is no obstacle to writing anew
    assert torch.equal(checkpoint.load(shards).embedding.weight, model.embedding.weight)


def test_the_description_is_written_after_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while the files take their names leaves no config.json of weights that are not there."""
    before = (folder / "config.json").read_text()

    def full(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(build(max_length=64), folder, family="llama")
    with pytest.raises(OSError, match="no space"):
        checkpoint.convert(folder, folder / "ours")
    assert (folder / "config.json").read_text() == before
    assert not list((folder / "ours").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"rope_parameters": "linear"}, "rope_parameters='linear'"),
        ({"model_type": ["llama"]}, r"unknown family \['llama'\]"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers: '3' is no number of layers"),
        ({"hidden_sizes": 16}, r"hidden_sizes=16 \(Did you mean 'hidden_size'\?\)"),
        ({"quantization_config": "fp8"}, "quantization_config: 'fp8' is no JSON object"),
    ],
)
def test_values_of_another_form_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


WILD = (None, True, False, 0, 1, -3, 10**30, 1.5, float("nan"), float("inf"), "", "64", "linear", [], [1], {}, {"a": 1})


@pytest.mark.parametrize("family", families(), ids=lambda family: str(family.model_type))
def test_any_value_of_any_key_is_a_spec_or_an_error_of_ours(family: Family) -> None:
    known = {family.depth, "model_type", "quantization_config", *(name for rule in family.rules for name in rule.names)}
    usual: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    usual |= {"n_embd": 32, "n_head": 4, "d_model": 32, "n_heads": 4, "max_position_embeddings": 64}
    usual |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
    base = {key: value for key, value in usual.items() if key in known} | {family.depth: 2}
    for key in sorted(known):
        for value in WILD:
            config = {"model_type": family.model_type, **base, key: value}
            with suppress(ConfigError):
                find(config).spec(config)


def test_keys_that_mean_nothing_are_passed_by(folder: Path) -> None:
    edit(folder, _attn_implementation_autoset=True, unsloth_version="2024.9", unsloth_fixed=True, _of_tomorrow=3)
    checkpoint.load(folder)


def test_fp8_with_one_scale_for_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.tensor(0.01)
    save_file(tensors, folder / WEIGHTS_FILE)
    edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": None})
    expected = (tensors[name].float() * 0.01).bfloat16().float()
    assert torch.equal(checkpoint.load(folder).get_parameter("layers.0.feedforward.down.weight"), expected)
    tensors[f"{name}_scale_inv"] = torch.ones(3, 2)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"_scale_inv is \(3, 2\), where blocks of \(128, 128\) make \(1, 1\)"):
        checkpoint.load(folder)


def test_another_mixer_is_said_plainly() -> None:
    spec = resolve(TransformerConfig, {**SPEC, "layers": [{**LAYER, "mixer": {"kind": "gated_delta", "heads": 2}}]})
    for family in families():
        with pytest.raises(ConfigError, match=r"layers\[0\].mixer is of the kind 'gated_delta', where this family has"):
            family.config(spec)


def test_an_explicit_scale_that_is_the_usual_one_can_be_said() -> None:
    latent = {"kind": "latent_attention", "heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 8, "value_dim": 8}
    latent["position"] = {"kind": "rope", "layout": "interleaved"}
    for scale, fits in ((0.25, True), (0.3, False)):
        spec = resolve(TransformerConfig, {**SPEC, "layers": [{**LAYER, "mixer": {**latent, "scale": scale}}]})
        assert ("deepseek_v3" in [family.model_type for family in fitting(spec)]) == fits


DOCS, RECIPES = (Path(__file__).parents[3] / name for name in ("docs/families.md", "recipes/models"))


def test_the_order_of_families_is_that_of_the_documentation() -> None:
    rows = [line.split("|")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(rows)) == ORDER
    assert [family.model_type for family in families() if family.model_type in ORDER] == ORDER


DEFAULT = {
    "llama-3.1-8b": "llama",
    "mistral-7b": "mistral",
    "mixtral-8x7b": "mixtral",
    "qwen2.5-7b": "qwen2",
    "qwen1.5-moe-a2.7b": "qwen2_moe",
    "qwen3-8b": "qwen3",
    "qwen3-30b-a3b": "qwen3_moe",
    "gemma-2-2b": "gemma2",
    "gemma-3-1b": "gemma3_text",
    "phi-3-mini-4k": "mistral",  # the two say the same; an imported one knows better
    "smollm3-3b": "smollm3",
    "granite-3.0-2b": "granite",
    "olmo-7b": "olmo",
    "olmo-2-7b": "olmo2",
    "olmoe-1b-7b": "olmoe",
    "stablelm-2-1.6b": "stablelm",
    "gpt2": "gpt2",
    "pythia-1b": "gpt_neox",
    "falcon-7b": "falcon",
    "bloom-560m": "bloom",
    "mpt-7b": "mpt",
    "opt-1.3b": "opt",
    "gpt-oss-20b": "gpt_oss",
    "deepseek-v2": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: str(path.stem))
def test_a_published_size_is_written_as_a_family_that_reads_it_again(path: Path) -> None:
    spec = resolve(TransformerConfig, path)
    chosen = checkpoint.choose(spec, None)
    assert chosen.model_type == DEFAULT.get(path.stem, chosen.model_type)
    again = find(chosen.config(spec)).spec(chosen.config(spec))
    assert unrolled(again) == unrolled(spec)
    assert checkpoint.choose(again, None) is chosen


def test_an_imported_folder_is_written_as_the_family_it_was(folder: Path, tmp_path: Path) -> None:
    edit(folder, model_type="mistral", sliding_window=None, attention_bias=None, mlp_bias=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    checkpoint.convert(folder, tmp_path / "ours")
    assert checkpoint.save_folder(tmp_path / "ours", tmp_path / "out").model_type == "mistral"
    assert checkpoint.save(load_model(tmp_path / "ours"), tmp_path / "by-order").model_type == "llama"
    assert checkpoint.save_folder(tmp_path / "ours", tmp_path / "named", family="llama").model_type == "llama"
