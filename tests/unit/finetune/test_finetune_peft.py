"""PEFT as the judge: it loads what we write, we load what it writes, and all compute the same, gradients included."""

import json

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from treadle.config import resolve
from treadle.errors import CheckpointError, ConfigError
from treadle.families import checkpoint
from treadle.finetune import FinetuneConfig
from treadle.finetune.attach import prepare, saved_parameters
from treadle.finetune.peft import load_peft, save_peft

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
FALCON = FalconConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
    new_decoder_architecture=True,
)  # fmt: skip
MODELS = {"llama": (LlamaForCausalLM, LLAMA), "gpt2": (GPT2LMHeadModel, GPT2), "falcon": (FalconForCausalLM, FALCON)}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "patterns": lambda: peft.LoraConfig(
        r=4, target_modules=ALL, rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 16, "layers.1.*q_proj": 3}
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=ALL),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        model, found[name] = kind(config).eval(), tmp_path_factory.mktemp(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(found[name])
    return found


def vary(parameters):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradient_norms(model, tokens, logits):
    logits.square().mean().backward()
    return sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()


def assert_equal(ours, theirs, *, gradients):
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(2))
    mine, other = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    if not gradients:
        return
    norms = [gradient_norms(model, tokens, logits) for model, logits in ((ours, mine), (theirs, other))]
    torch.testing.assert_close(*norms, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_writes_is_read(name, folders, tmp_path):
    theirs = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folders["llama"]), THEIRS[name]()).eval()
    vary(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(folders["llama"])
    load_peft(ours, tmp_path)
    assert_equal(ours.eval(), theirs, gradients=name != "patterns")  # where B makes up for another scale


QKV, OUT = "layers.*.mixer.qkv", "layers.*.mixer.out"
OURS = {
    "lora": ("llama", {"rank": 4}),
    "ranks": ("llama", {"targets": {"layers.*.mixer.qkv.q": 3, "layers.0.feedforward.**": 5}, "rs": True}),
    "pissa": ("llama", {"rank": 4, "init": "pissa"}),
    "dora": ("llama", {"method": "dora", "rank": 4}),
    "ia3": ("llama", {"method": "ia3"}),
    "inputs first": ("gpt2", {"rank": 4}),
    "a part of c_attn": ("gpt2", {"targets": {f"{QKV}.v": 4}}),
    "groups": ("falcon", {"targets": {QKV: 4, f"{QKV}.k": 2, OUT: 3}}),
    "dora in groups": ("falcon", {"method": "dora", "targets": {QKV: 4}}),
}


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_what_we_write(name, folders, tmp_path):
    family, config = OURS[name]
    ours = prepare(checkpoint.load(folders[family]), resolve(FinetuneConfig, config)).eval()
    vary(p for n, p in saved_parameters(ours) if "0." not in n.rpartition("updates.")[2])
    save_peft(ours, tmp_path, family=family)
    theirs = peft.PeftModel.from_pretrained(MODELS[family][0].from_pretrained(folders[family]), tmp_path).eval()
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        base = checkpoint.load(folders[family])
        assert (ours(tokens) - base(tokens)).abs().max() > 1e-2
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=2e-5)
        load_peft(base, tmp_path, family=family)
        torch.testing.assert_close(base.eval()(tokens), ours(tokens), atol=2e-5, rtol=2e-5)


def test_what_is_not_known_is_refused(folders, tmp_path):
    ours = prepare(checkpoint.load(folders["llama"]), resolve(FinetuneConfig, {"rank": 2}))
    save_peft(ours, tmp_path, family="llama")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"peft_type": "VERA"}, "VERA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_peft(checkpoint.load(folders["llama"]), tmp_path)
    with pytest.raises(ConfigError, match="MoRA"):
        save_peft(prepare(checkpoint.load(folders["llama"]), FinetuneConfig(method="mora")), tmp_path / "no")
