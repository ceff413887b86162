"""Every family against transformers: a random tiny model goes in, is compared, and goes out again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families_zoo import CASES, Case
from torch import Tensor, nn

from treadle.families.checkpoint import load, read_config, read_spec, save
from treadle.families.family import families, fitting
from treadle.nn.transformer import Transformer

transformers = pytest.importorskip("transformers")


def published(case: Case, folder: Path) -> nn.Module:
    """A random model of the case, as transformers writes it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.config}Config")(**case.arguments)
    model = getattr(transformers, case.model or f"{case.config}ForCausalLM")(config).float()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))):
            tensor.add_(0.1 * torch.randn_like(tensor))  # norms at one and biases at zero would hide a swap
    model.save_pretrained(folder)
    return model


def reloaded(folder: Path, attention: str = "eager") -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def logits(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        result: Any = model(tokens_BS) if isinstance(model, Transformer) else model(tokens_BS, use_cache=False).logits
    return result  # type: ignore[no-any-return]


def says(now: Any, was: Any) -> bool:
    """Whether a value is the same, or a mapping that has everything that was there, defaults written out beside, but
    for what transformers writes into every config."""
    if isinstance(now, dict) and isinstance(was, dict):
        common = transformers.PreTrainedConfig().to_dict()
        said = {key: value for key, value in was.items() if key in now or (value and key not in common)}
        return all(key in now and says(now[key], value) for key, value in said.items())
    return bool(now == was)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_comes_in_and_goes_out_unchanged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    published(case, tmp_path / "in")
    peer, model = reloaded(tmp_path / "in", case.attention), load(tmp_path / "in")
    rows = [torch.randint(0, 131, (2, length)) for length in case.lengths]
    expected = [logits(peer, tokens_BS) for tokens_BS in rows]
    for tokens_BS, theirs in zip(rows, expected, strict=True):
        error = (logits(model, tokens_BS) - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
        assert error <= case.tolerance, f"length {tokens_BS.shape[1]}: {error:.2e}"

    family = save(model, tmp_path / "out", family=read_config(tmp_path / "in")["model_type"])
    again = reloaded(tmp_path / "out", case.attention)
    for tokens_BS, theirs in zip(rows, expected, strict=True):
        assert torch.equal(logits(again, tokens_BS), theirs)
    second = load(tmp_path / "out")
    assert second.config == model.config
    for (ours, tensor), (_, other) in zip(model.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(tensor, other), ours
    assert family in fitting(model.config)
    was, now = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out"))
    differing = {key: (was[key], now[key]) for key in was.keys() & now.keys() if not says(now[key], was[key])}
    assert differing.keys() <= {"dtype", "transformers_version"}, differing


def test_every_family_has_a_case() -> None:
    covered = {getattr(transformers, f"{case.config}Config").model_type for case in CASES.values()}
    assert {family.model_type for family in families()} <= covered


def test_defaults_are_those_of_transformers() -> None:
    """A key that a config.json leaves out means what it means there."""
    for case in CASES.values():
        config = getattr(transformers, f"{case.config}Config")()
        (family,) = [family for family in families() if family.model_type == config.model_type]
        for rule in family.rules:
            default = getattr(rule, "default", None)
            if hasattr(rule, "paths") and isinstance(default, int | float | str | bool):
                value = getattr(config, rule.names[0], default)
                # The classes of transformers work None out, as the blocks here do.
                assert value == default, f"{family.model_type}: {rule.names[0]} is {value} there, {default} here"


def test_spec_of_a_family_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8, "hidden_size": 8}))
    with pytest.raises(Exception, match="num_hidden_layers"):
        read_spec(tmp_path)


BF16 = ["llama", "qwen3", "qwen3-moe", "gemma2", "gemma3", "olmo2", "gpt2", "falcon-7b", "gpt-oss"]
BF16 += ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"]


@pytest.mark.parametrize("name", BF16)
def test_bf16_is_as_near_to_fp32_as_in_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    peer = published(case, tmp_path).bfloat16()
    for key, buffer in peer.named_buffers():  # nearly equal, as they become in training; bf16 would make them equal
        if key.endswith("correction_bias"):
            buffer.data = 5 + 0.01 * torch.randn(buffer.shape)
    peer.save_pretrained(tmp_path)
    wide, model = reloaded(tmp_path, case.attention), load(tmp_path, dtype=torch.bfloat16)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=case.attention
    ).eval()
    tokens_BS = torch.randint(0, 131, (8, 60))
    exact = logits(wide, tokens_BS)
    theirs, ours = ((logits(m, tokens_BS).float() - exact).abs().mean().item() for m in (narrow, model))
    assert ours <= 1.2 * theirs, f"mean error {ours:.2e} here, {theirs:.2e} there"
