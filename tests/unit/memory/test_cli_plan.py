"""`treadle plan` from the command line."""

import json

import pytest
from typer.testing import CliRunner

from treadle import cli

SPEC = """
dim: 64
vocab_size: 256
max_length: 128
layers: [{kind: pre_norm, repeat: 4, mixer: {kind: attention, heads: 4}, feedforward: {kind: gated, dim: 128}}]
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(SPEC)
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_tables_and_verdict(spec):
    shown = run(spec, "training.compile=false", "--gpus", 4, "parallel.pipeline=2", "training.micro_batch_size=1")
    for word in (
        "rank 0",
        "rank 1",
        "parameters",
        "activations",
        "send: pipeline",
        "bubble",
        "fits:",
        "tokens/s",
        "MFU",
    ):
        assert word in shown


def test_numbers_for_a_program(spec):
    found = json.loads(run(spec, "training.compile=false", "--json", "--gpus", 2))
    assert found["verdict"] == "fits"
    assert found["cheapest"] == []
    assert found["footprints"][0]["parameters"] == 4 * (4 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 256 * 64) / 2


def test_what_does_not_fit_exits_with_one(spec, tmp_path):
    from treadle.memory.devices import DEVICES

    small = tmp_path / "small.yaml"
    values = {**DEVICES["h100"].model_dump(), "name": "small", "memory_gib": 1.0, "context_gib": 0.1}
    small.write_text("\n".join(f"{key}: {value}" for key, value in values.items()))
    shown = run(spec, "training.compile=false", "training.batch_size=8192", "--device", small, code=1)
    assert "does not fit" in shown
    assert "training.micro_batch_size=" in shown


def test_search_writes_what_it_found(spec, tmp_path):
    out = tmp_path / "best.yaml"
    shown = run(spec, "training.compile=false", "training.batch_size=32", "--gpus", 8, "--search", "--write", out)
    assert "the first of them:" in shown
    again = tmp_path / "recipe.yaml"
    again.write_text(SPEC)
    assert "training" in out.read_text() or "parallel" in out.read_text()


def test_bad_input(spec):
    assert "'h1000' is not known" in run(spec, "--device", "h1000", code=2)
    assert "parallel.tensor" in run(spec, "--gpus", 3, "parallel.tensor=3", code=2)
    run(spec, "--write", "x.yaml", code=2)
