"""`treadle convert`, with a tokenizer: our model out, read by transformers, and in again."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from treadle import api, cli
from treadle.config import resolve
from treadle.data.tokenizer import BytesTokenizerConfig, Tokenizer, TrainTokenizerConfig
from treadle.errors import DataError
from treadle.nn.store import save_model
from treadle.nn.transformer import TransformerConfig
from treadle.nn.weights import WEIGHTS_FILE

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
    assert "no such folder, and no such run" in run("hf-export", tmp_path / "nowhere", tmp_path / "x").output
    result = run("hf-export", ours, tmp_path / "y", "--family", "lamma")
    assert "unknown family 'lamma'. Did you mean 'llama'?" in result.output
    assert "config.json" not in result.output
    assert "closest" not in result.output
    result = run("hf-export", ours, tmp_path / "y", "--dtype", "int3")
    assert result.exit_code == 2
    assert "--dtype: 'int3'; expected auto, bf16" in result.output


def test_a_checkpoint_without_tokenizer_says_so(ours: Path, tmp_path: Path) -> None:
    assert run("hf-export", ours, tmp_path / "out").exit_code == 0
    for path in (tmp_path / "out").glob("tokenizer*"):
        path.unlink()
    result = run("hf-import", tmp_path / "out", tmp_path / "in")
    assert result.exit_code == 0
    assert "there is no tokenizer.json" in result.output
    assert f"save_pretrained('{tmp_path / 'in/tokenizer'}')" in result.output
    again, tokenizer = api.load(tmp_path / "in")
    assert tokenizer is None
    with pytest.raises(DataError, match=r"the model has no tokenizer: .*save_pretrained"):
        api.generate(again, tokenizer)
    assert run("hf-export", tmp_path / "in", tmp_path / "again").exit_code == 0
    assert load_file(tmp_path / "again" / WEIGHTS_FILE).keys() == load_file(tmp_path / "out" / WEIGHTS_FILE).keys()


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


def theirs(folder: Path, **config: Any) -> Any:
    """A tokenizer as transformers writes it: a text begins with <s>, ends with </s>, and there is a chat template."""
    transformers = pytest.importorskip("transformers")
    backend = TrainTokenizerConfig(vocab_size=300, special_tokens=["</s>", "<s>", "<pad>"]).build([TEXT]).backend
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_tokenizer_and_generation_settings_come_back_as_they_were(ours: Path, tmp_path: Path) -> None:
    out, back, again = tmp_path / "out", tmp_path / "back", tmp_path / "again"
    assert run("hf-export", ours, out).exit_code == 0
    tokenizer = theirs(out)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "temperature": 0.6}))
    assert run("hf-import", out, back).exit_code == 0
    assert run("hf-export", back, again).exit_code == 0
    kept = [*out.glob("*token*"), *out.glob("chat_template*"), out / "generation_config.json"]
    assert len(kept) >= 4
    for path in kept:
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    config = json.loads((again / "config.json").read_text())
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["eos_token_id"] == stops, "what the makers say about generation counts more"


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}])
def test_a_prompt_begins_as_the_tokenizer_of_transformers_has_it(config: dict[str, bool], tmp_path: Path) -> None:
    peer = theirs(tmp_path, **config)
    tokenizer = Tokenizer.load(tmp_path)
    assert [*tokenizer.opening, *tokenizer.encode("the fox")] == peer("the fox")["input_ids"]
    assert tokenizer.opening == [peer.bos_token_id]
    assert Tokenizer.load(tokenizer.save(tmp_path / "run")).opening == [], "what a run trains on has none"


def test_an_opening_that_is_also_the_end(tmp_path: Path) -> None:
    """OPT begins a text with </s>; others end one with it."""
    backend = BytesTokenizerConfig(special_tokens=["</s>"]).build().backend
    for single, expected in (("</s> $A", [256]), ("$A </s>", []), ("</s> $A </s>", [256])):
        backend.post_processor = TemplateProcessing(single=single, special_tokens=[("</s>", 256)])
        backend.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer.load(tmp_path, eos="</s>").opening == expected


def test_generation_begins_with_the_opening(ours: Path, tmp_path: Path) -> None:
    folder = ours / "tokenizer"
    for path in folder.iterdir():
        path.unlink()
    peer = theirs(folder)
    model, tokenizer = api.load(ours)
    seen: list[list[int]] = []
    model.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].tolist()))
    api.generate(model, tokenizer, "the fox", max_new_tokens=1)
    api.generate(model, tokenizer, "", max_new_tokens=1)
    assert seen == [peer("the fox")["input_ids"], [peer.bos_token_id]]


def test_a_tokenizer_that_does_not_say_its_end(ours: Path, tmp_path: Path) -> None:
    assert run("hf-export", ours, tmp_path / "out").exit_code == 0
    theirs(tmp_path / "out")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="or by hf-import --eos"):
        api.load(tmp_path / "out")
    assert run("hf-import", tmp_path / "out", tmp_path / "in", "--eos", "</s>").exit_code == 0
    _, tokenizer = api.load(tmp_path / "in")
    assert tokenizer is not None
    assert tokenizer.eos == "</s>"


def test_no_checkpoint_is_written_over_by_one_of_the_other_kind(ours: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert run("hf-export", ours, out).exit_code == 0
    assert run("hf-import", out, back).exit_code == 0
    before = {path: path.read_bytes() for folder in (ours, out, back) for path in folder.rglob("*") if path.is_file()}
    for command in (("hf-export", ours, ours), ("hf-export", ours, back), ("hf-import", out, out)):
        result = run(*command, "--overwrite")
        assert result.exit_code == 2
        assert "which would be lost; choose another folder" in result.output
    file = out / "config.json"
    assert f"{file}: is a file" in run("hf-import", out, file).output
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run("hf-export", ours, out, "--overwrite").exit_code == 0, "the same kind may be written again"
    assert run("hf-import", out, back, "--overwrite").exit_code == 0
    result = run("hf-export", out, tmp_path / "other")
    assert "is a Hugging Face checkpoint already" in result.output


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_dtypes_go_by_both_of_their_names(name: str, ours: Path, tmp_path: Path) -> None:
    result = run("hf-export", ours, tmp_path / "out", "--dtype", name)
    assert result.exit_code == 0
    assert result.output.startswith(str(tmp_path)), "and no empty line where there is no terminal"
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS_FILE).values()} == {torch.bfloat16}


def test_what_predicts_further_tokens_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(
        resolve(TransformerConfig, {**SPEC, "multi_token": {"kind": "sequential"}}).build().initialise(0),
        tmp_path / "ours",
    )
    result = run("hf-export", tmp_path / "ours", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "multi_token is left out" in caplog.text
    model, _ = api.load(tmp_path / "out")
    tokens_BS = torch.randint(0, 320, (2, 20))
    with torch.no_grad():
        assert torch.equal(model(tokens_BS), api.load(tmp_path / "ours")[0](tokens_BS))


BLOCK = """
from dataclasses import replace
from typing import Literal

from treadle.families.llama import FAMILY as LLAMA, LAYER
from treadle.families.rules import Key
from treadle.nn.feedforward import Gated, GatedConfig


class TwiceConfig(GatedConfig):
    kind: Literal["twice"] = "twice"


class Twice(Gated):
    def forward(self, x_BSD):
        return 2 * super().forward(x_BSD)


WIDTH = Key("intermediate_size", "layers.*.feedforward.dim")
RULES = [WIDTH if "intermediate_size" in rule.names else rule for rule in LLAMA.rules]
FAMILY = replace(LLAMA, model_type="twice", layer={**LAYER, "feedforward": {"kind": "twice"}}, rules=RULES)
"""


RUN_ALL = """
import json, sys
from typer.testing import CliRunner
from treadle import cli
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    print(json.dumps(result.output))
"""


def alone(*commands: list[str | Path]) -> list[str]:
    """What each command prints, all in a process of their own."""
    asked = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, asked], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_block_of_ones_own_goes_with_the_folder(ours: Path, tmp_path: Path) -> None:
    """Another process, another place, the file gone: the folder loads, is shown and exported by itself."""
    file = tmp_path / "blocks.py"
    file.write_text(BLOCK)
    assert run("hf-export", ours, tmp_path / "in", "--family", "llama").exit_code == 0
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps({**config, "model_type": "twice"}))

    sample = ["-n", "8", "-t", "0", "-p", "the", "--device", "cpu"]
    first, shown = alone(
        ["convert", "hf-import", tmp_path / "in", tmp_path / "mine", "--import", file],
        ["generate", tmp_path / "in", "--import", file, *sample],
        ["model", "show", tmp_path / "in", "--import", file],
    )[1:]
    assert "Twice" in shown
    file.unlink()
    (tmp_path / "mine").rename(tmp_path / "moved")
    second, _ = alone(
        ["generate", tmp_path / "moved", *sample], ["convert", "hf-export", tmp_path / "moved", tmp_path / "out"]
    )
    assert second == first
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "twice"
