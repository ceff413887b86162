"""`treadle data` and `treadle tokenizer`, as they are typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from treadle.cli import app
from treadle.data.tokenizer import Tokenizer

SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tinyshakespeare.txt"
QUICKSTART = Path(__file__).parents[3] / "recipes/quickstart.yaml"
pytestmark = pytest.mark.usefixtures("_wide")


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    rows = [{"text": f"row {i}: " + "all work and no play " * i} for i in range(60)]
    Path("corpus/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("corpus/b.txt").write_text("\n\n".join(row["text"] for row in rows))


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def prepared() -> Path:
    run("data", "prepare", "corpus/a.jsonl", "--tokenizer", "bytes", "--held-out", "0.2", "--workers", "1")
    (folder,) = Path("cache/tokens").glob("jsonl-*[!k]")
    return folder


def test_prepare_inspect_and_verify() -> None:
    folder = prepared()
    shown = run("data", "inspect", str(folder), "-n", "1").output
    assert "train" in shown
    assert "validation" in shown
    assert "uint16" in shown
    assert "row 1: all work" in shown
    assert "<|endoftext|>" in shown
    assert "tokens in 1 shard" in run("data", "verify", str(folder)).output
    assert "row 1:" in run("data", "inspect", str(folder / "train")).output


def test_verify_names_the_damaged_file() -> None:
    folder = prepared()
    file = folder / "train/00000.tokens"
    file.write_bytes(b"\x07" + file.read_bytes()[1:])
    assert "00000.tokens: sha256" in run("data", "verify", str(folder), code=2).stderr


def test_prepare_from_a_recipe() -> None:
    source = 'data.sources=[{kind: text, paths: corpus/b.txt, separator: "\\n\\n"}]'
    changes = [source, "data.tokenizer={kind: bytes}", "data.held_out=0.2", "data.workers=1"]
    assert "validation" in run("data", "prepare", str(QUICKSTART), *changes).output


def test_mistakes_are_explained() -> None:
    assert "several kinds" in run("data", "prepare", "corpus/a.jsonl", "corpus/b.txt", code=2).stderr
    assert "no such file" in run("data", "prepare", "nothing.txt", "--tokenizer", "bytes", code=2).stderr
    assert "set at least 257" in run("data", "prepare", "corpus/b.txt", "--vocab-size", "9", code=2).stderr
    assert "no finished token shards" in run("data", "inspect", "corpus", code=2).stderr
    assert (
        "held_out" in run("data", "prepare", "corpus/b.txt", "--tokenizer", "bytes", "--held-out", "2", code=2).stderr
    )


def test_train_and_inspect_a_tokenizer() -> None:
    output = run("tokenizer", "train", "corpus/b.txt", "--separator", "\n\n", "--vocab-size", "280", "-o", "t").output
    assert "t: 280 tokens" in output
    assert Tokenizer.load("t").vocab_size == 280
    shown = run("tokenizer", "inspect", "t", "all work\né").output
    assert "280" in shown
    assert "<|endoftext|> = 279" in shown
    assert "11 bytes" in shown
    assert "all work⏎" in shown
    assert "bytes/token" in run("tokenizer", "inspect", "t").output


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs ../shared/data/tinyshakespeare.txt")
def test_real_text() -> None:
    command = ["data", "prepare", str(SHAKESPEARE), "--separator", "\n\n", "--vocab-size", "512", "--workers", "1"]
    shown = run(*command).output
    assert "7,154" in shown
    assert "68" in shown
