"""`treadle model`: the numbers that a reader would work out by hand."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treadle import cli

SPEC = """
dim: 16
vocab_size: 64
max_length: 32
layers:
  - kind: cycle
    repeat: 2
    layers:
      - {kind: pre_norm, repeat: 2, mixer: {kind: attention, heads: 4, window: 8}, feedforward: {kind: dense, dim: 24}}
      - {kind: sandwich, mixer: {kind: attention, heads: 4, kv_heads: 2}, feedforward: {kind: gated, dim: 24}}
"""


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["model", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "model.yaml"
    path.write_text(SPEC)
    return str(path)


def test_show_folds_equal_layers_and_counts(spec: str) -> None:
    shown = run("show", spec)
    lines = shown.splitlines()
    local, whole = 2 * 16 + 4 * 16 * 16 + 2 * 16 * 24, 4 * 16 + 3 * 16 * 16 + 3 * 16 * 24
    assert f"{4 * local + 2 * whole + 2 * 64 * 16 + 16:,} parameters" in lines[0]
    assert f"{2 * (4 * 32 + 2 * 16)} cache bytes" in lines[0]
    (folded,) = [line for line in lines if "layers 0-1, 3-4 (4 equal, each)" in line]
    # Two FLOPs for each of its matrices' elements, and 4 x 16 for each of the 8 - 8^2 / (2 * 32) tokens that a query
    # sees on average: the first ones of a row see less than the window.
    assert f"{local:,} parameters" in folded
    assert f"{(2 * (local - 32) + 4 * 16 * 7) / 1000:.3g} k FLOPs" in folded
    assert any("layers 2, 5 (2 equal, each)  Sandwich" in line for line in lines)
    assert any("qkv  Linear  [48 × 16] column" in line for line in lines)
    assert sum("mixer_norm" in line for line in lines) == 2


def test_show_lists_multi_token_apart(spec: str) -> None:
    shown = run("show", spec, "multi_token={kind: sequential, depth: 1}")
    plain = run("show", spec)
    # A layer as the last of the stack (a sandwich, so four norms), the projection, and three norms around them.
    module = 4 * 16 + 3 * 16 * 16 + 3 * 16 * 24 + 2 * 16 * 16 + 3 * 16
    (line,) = [line for line in shown.splitlines() if "multi_token  SequentialMultiToken" in line]
    assert f"{module:,} parameters" in line
    assert any("project  Linear  [16 × 32] replicate" in line for line in shown.splitlines())
    assert "Only training runs multi_token" in shown
    assert "multi_token" not in plain
    first, without = shown.splitlines()[0].split("parameters"), plain.splitlines()[0].split("parameters")
    assert first[1] == without[1], "FLOPs and cache are those of inference"
    assert first[0] != without[0]


def test_show_takes_recipes_overrides_and_length() -> None:
    quickstart = str(Path(__file__).parents[3] / "recipes/quickstart.yaml")
    shown = run("show", quickstart, "preset=null", "model.dim=96", "--length", "100")
    assert "[4096 × 96] vocab" in shown, "the vocabulary is the tokenizer's"
    assert "length of 100" in shown
    assert "head  Head  [4096 × 96] shared" in shown, "it is tied"


def test_diff_shows_keys_and_costs(spec: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SPEC.replace("vocab_size: 64", "vocab_size: 128"))
    lines = [line.split() for line in run("diff", spec, str(other)).splitlines()]
    assert ["vocab_size", "64", "128"] in lines
    assert {line[0] for line in lines[1:]} == {"vocab_size", "parameters", "FLOPs"}
    assert run("diff", spec, spec) == "no difference\n"


def test_a_model_without_vocabulary_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(SPEC.replace("vocab_size: 64\n", ""))
    result = CliRunner().invoke(cli.app, ["model", "show", str(path)])
    assert result.exit_code == 2
    assert "vocab_size: not set" in result.output
    assert "[64 × 16]" in run("show", str(path), "vocab_size=64")


def test_a_hugging_face_folder_is_shown_and_compared(tmp_path: Path) -> None:
    """Its config.json is enough."""
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
    }
    config |= {"num_attention_heads": 4, "max_position_embeddings": 32}
    for name, width in (("a", 24), ("b", 32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "intermediate_size": width}))
    layer = 2 * 16 + 4 * 16 * 16 + 3 * 16 * 24
    assert f"{3 * layer + 2 * 64 * 16 + 16:,} parameters" in run("show", str(tmp_path / "a"))
    assert f"{3 * layer + 2 * 80 * 16 + 16:,} parameters" in run("show", str(tmp_path / "a"), "vocab_size=80")
    differing = run("diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert "feedforward.dim" in differing
    assert "32" in differing
