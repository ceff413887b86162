"""Whole models in bf16: no further from float32 than transformers is, which rounds in places of its own."""

from pathlib import Path

import pytest
import torch
from families_zoo import CASES
from test_families_parity import logits, published, transformers

from treadle.families.checkpoint import load

FAMILIES = ["llama", "qwen3", "qwen3-moe", "gemma2", "gemma3", "olmo2", "falcon-7b", "gpt-oss"]
FAMILIES += ["deepseek-v2-lite", "deepseek-v3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_as_exact_as_transformers(name: str, tmp_path: Path) -> None:
    """Mean errors of both against transformers in float32, with the same weights, which are bf16 numbers."""
    published(CASES[name], tmp_path).bfloat16().save_pretrained(tmp_path)
    tokens_BS = torch.randint(0, 131, (16, 60), generator=torch.Generator().manual_seed(1))
    exact, theirs = (
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval(), tokens_BS).double()
        for dtype in (torch.float32, torch.bfloat16)
    )
    ours = logits(load(tmp_path, dtype=torch.bfloat16), tokens_BS).double()
    error, allowed = ((each - exact).abs().mean() for each in (ours, theirs))
    assert error <= 1.2 * allowed, f"{error:.2e}, transformers {allowed:.2e}"
