"""Dtypes on the way in and out: what stays in float32, what is kept as it was, and bf16 against transformers' own."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle.config import resolve
from treadle.families import checkpoint
from treadle.nn.store import load_model, save_model
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import WEIGHTS_FILE, WeightsReader

LATENT = {"heads": 2, "q_rank": 8, "kv_rank": 8, "nope_dim": 8, "rope_dim": 8, "value_dim": 8}
DEEPSEEK: dict[str, Any] = {
    "kind": "pre_norm",
    "repeat": 2,
    "norm": {"kind": "rms", "eps": 1e-6},
    "mixer": {"kind": "latent_attention", **LATENT, "position": {"kind": "rope", "layout": "interleaved"}},
    "feedforward": {
        "kind": "moe",
        "experts": 16,
        "top_k": 2,
        "dim": 8,
        "router": {"kind": "sigmoid"},
        "balance_bias": 0.001,
        "shared": {"kind": "gated", "dim": 8},
    },
}
SPEC = {"dim": 16, "vocab_size": 50, "max_length": 32, "layers": [DEEPSEEK], "norm": {"kind": "rms", "eps": 1e-6}}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
OURS = "layers.1.feedforward.router.balance_bias"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """As DeepSeek publishes: everything in bf16, but for the experts' biases, which bf16 would make equal."""
    model: Transformer = resolve(TransformerConfig, SPEC).build().initialise(0)
    checkpoint.save(model, tmp_path / "in", family="deepseek_v3")
    path = tmp_path / "in" / WEIGHTS_FILE
    tensors = {
        name: 5 + torch.arange(16) / 1000 if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "in"


def test_the_experts_bias_is_never_rounded(mixed: Path, tmp_path: Path) -> None:
    expected = load_file(mixed / WEIGHTS_FILE)[BIAS]
    assert expected.unique().numel() == 16
    assert expected.bfloat16().unique().numel() == 1
    loaded = checkpoint.load(mixed, dtype=torch.bfloat16)
    assert torch.equal(loaded.get_parameter(OURS), expected)
    assert loaded.get_parameter("embedding.weight").dtype == loaded.dtype == torch.bfloat16
    checkpoint.convert(mixed, tmp_path / "ours", dtype=torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "ours" / WEIGHTS_FILE)[OURS], expected)
    again = load_model(tmp_path / "ours", dtype=torch.bfloat16)
    assert torch.equal(again.get_parameter(OURS), expected)
    save_model(again, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved").get_parameter(OURS), expected)
    checkpoint.save_folder(tmp_path / "ours", tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS_FILE)[BIAS], expected)


def test_each_tensor_keeps_its_dtype_there_and_back(mixed: Path, tmp_path: Path) -> None:
    before = load_file(mixed / WEIGHTS_FILE)
    before["model.norm.weight"] = before["model.norm.weight"].float() + 1e-4
    save_file(before, mixed / WEIGHTS_FILE)
    checkpoint.convert(mixed, tmp_path / "ours")
    family = checkpoint.save_folder(tmp_path / "ours", tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert family.model_type == "deepseek_v3"
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_parts_of_different_dtypes_share_the_wider(mixed: Path, tmp_path: Path) -> None:
    tensors = load_file(mixed / WEIGHTS_FILE)
    name = "model.layers.0.mlp.shared_experts.up_proj.weight"
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, mixed / WEIGHTS_FILE)
    checkpoint.convert(mixed, tmp_path / "ours")
    checkpoint.save_folder(tmp_path / "ours", tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS_FILE)[name], tensors[name])


def test_one_source_of_a_mixture_is_in_memory_at_a_time(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's gate and up have 32 sources here, 512 in DeepSeek-V3."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts, names = [], []
    read = WeightsReader.tensor

    def counted(self: WeightsReader, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive.add(tensor)
        counts.append(len(alive))
        names.append(name)
        return tensor

    monkeypatch.setattr(WeightsReader, "tensor", counted)
    checkpoint.load(mixed)
    assert max(counts) == 1
    assert len(names) == len(set(names)) == len(load_file(mixed / WEIGHTS_FILE)), "and each is read once"
    checkpoint.convert(mixed, tmp_path / "ours")
    assert max(counts) == 1
    counts.clear()
    names.clear()
    checkpoint.save_folder(tmp_path / "ours", tmp_path / "out")
    assert max(counts) <= 2, "the parameter that is cut up, and the next; none of it is kept"
    assert len(names) == len(set(names))
