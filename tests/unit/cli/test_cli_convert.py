"""`treadle convert`, with a tokenizer: our model out, read by transformers, and in again."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from treadle import api, cli
from treadle.config import resolve
from treadle.data.tokenizer import BytesTokenizerConfig, TrainTokenizerConfig
from treadle.nn.store import save_model
from treadle.nn.transformer import TransformerConfig

DOCS = Path(__file__).parents[3] / "docs/families.md"
LAYER = {
    "kind": "pre_norm",
    "repeat": 2,
    "norm": {"kind": "rms", "eps": 1e-6},
    "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "gated", "dim": 24},
}
SPEC = {"dim": 16, "vocab_size": 320, "max_length": 64, "layers": [LAYER], "norm": {"kind": "rms", "eps": 1e-6}}
TEXT = "the quick brown fox jumps over the lazy dog, über 3.14 times\n\n" * 20


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    save_model(resolve(TransformerConfig, SPEC).build().initialise(0).to(torch.bfloat16), folder)
    TrainTokenizerConfig(vocab_size=300).build([TEXT]).save(folder / "tokenizer")
    return folder


def test_out_and_in_again(ours: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out, back = tmp_path / "out", tmp_path / "back"
    result = run("hf-export", ours, out, "--family", "llama")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.output
    peer = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert peer.dtype == torch.bfloat16, "as it was"
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    model, tokenizer = api.load(ours)
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert theirs.eos_token_id == tokenizer.eos_id
    tokens_BS = torch.tensor([tokenizer.encode(TEXT)[:60]])
    with torch.no_grad():
        assert (peer.float()(tokens_BS).logits - model(tokens_BS)).abs().max() < 1e-5

    result = run("hf-import", out, back)
    assert result.exit_code == 0, result.output
    assert "parameters" in result.output
    again, same = api.load(back)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert same.encode(TEXT) == tokenizer.encode(TEXT)
    assert api.generate(*api.load(out), "the quick", max_new_tokens=8) == api.generate(
        again, same, "the quick", max_new_tokens=8
    )


def test_inspect_prints_a_spec_that_resolves(ours: Path, tmp_path: Path) -> None:
    import yaml

    assert run("hf-export", ours, tmp_path / "out").exit_code == 0
    shown = run("inspect", tmp_path / "out").output
    first, _, rest = shown.partition("\n")
    assert re.match(r"family \w+ \(\w+ForCausalLM\), 14,\d+ parameters", first)
    spec, _, last = rest.rpartition("\n\n")
    assert resolve(TransformerConfig, yaml.safe_load(spec)).dim == 16
    assert "tensors fit, in bfloat16" in last


def test_nothing_is_overwritten_unasked(ours: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for command in (("hf-export", ours, target), ("hf-import", ours, target)):
        result = run(*command)
        assert result.exit_code == 2
        assert "is not empty; choose another folder, or pass --overwrite" in result.output
    assert run("hf-export", ours, target, "--overwrite").exit_code == 0
    assert (target / "notes.txt").read_text() == "mine"


def test_bad_input_is_one_message(ours: Path, tmp_path: Path) -> None:
    result = run("hf-import", tmp_path / "nowhere", tmp_path / "x")
    assert result.exit_code == 2
    assert "nowhere: no such folder" in result.output
    result = run("hf-export", ours, tmp_path / "y", "--dtype", "int3")
    assert result.exit_code == 2
    assert "--dtype: 'int3'; expected bf16" in result.output


def test_a_checkpoint_without_tokenizer_says_so(ours: Path, tmp_path: Path) -> None:
    assert run("hf-export", ours, tmp_path / "out").exit_code == 0
    for path in (tmp_path / "out").glob("tokenizer*"):
        path.unlink()
    result = run("hf-import", tmp_path / "out", tmp_path / "in")
    assert result.exit_code == 0
    assert "no tokenizer.json came with it" in result.output


def test_a_family_of_ones_own_is_the_file_of_the_documentation(tmp_path: Path) -> None:
    """The page's code is run as it stands, and its count of lines is true."""
    transformers = pytest.importorskip("transformers")
    (code,) = re.findall(r"```python\n(\"\"\"StarCoder 2.*?)```", DOCS.read_text(), re.DOTALL)
    assert f"That is all, {len(code.splitlines())} lines" in DOCS.read_text()
    file = tmp_path / "starcoder2.py"
    file.write_text(code)
    config = transformers.Starcoder2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in peer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "in")
    BytesTokenizerConfig().build().save(tmp_path / "in")
    result = run("hf-import", tmp_path / "in", tmp_path / "ours", "--import", file)
    assert result.exit_code == 0, result.output
    model, _ = api.load(tmp_path / "ours")
    tokens_BS = torch.randint(0, 320, (2, 40))
    with torch.no_grad():
        assert (model(tokens_BS) - peer(tokens_BS).logits).abs().max() < 1e-5
    result = run("hf-export", tmp_path / "ours", tmp_path / "out", "--family", "starcoder2", "--import", file)
    assert result.exit_code == 0, result.output
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    for (name, theirs), (_, tensor) in zip(peer.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(theirs, tensor), name
    with torch.no_grad():
        assert (again(tokens_BS).logits - peer(tokens_BS).logits).abs().max() < 1e-6
