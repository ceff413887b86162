"""Whole models whose positions differ, against transformers: learned, offset, ALiBi, partial, scaled; and sinks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle.attention import AttentionContext, AttentionFacts, attend
from treadle.config import resolve
from treadle.nn.transformer import Transformer, TransformerConfig

transformers = pytest.importorskip("transformers")

DIM, HEADS, LENGTH, VOCABULARY = 48, 6, 64, 97
SIZES = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
SIZES |= {"max_position_embeddings": LENGTH, "tie_word_embeddings": False}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
NTK = {"kind": "dynamic_ntk", "factor": 3.0, "original_length": 20}

# Our leaf, and the leaves of theirs that it stacks; a list is concatenated, "T" transposes (GPT-2's Conv1D).
GPT2 = {
    "mixer_norm": ["ln_1"],
    "mixer.qkv": ["attn.c_attn", "T"],
    "mixer.out": ["attn.c_proj", "T"],
    "feedforward_norm": ["ln_2"],
    "feedforward.up": ["mlp.c_fc", "T"],
    "feedforward.down": ["mlp.c_proj", "T"],
}
OPT = {
    "mixer_norm": ["self_attn_layer_norm"],
    "mixer.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
    "mixer.out": ["self_attn.out_proj"],
    "feedforward_norm": ["final_layer_norm"],
    "feedforward.up": ["fc1"],
    "feedforward.down": ["fc2"],
}
MPT = {
    "mixer_norm": ["norm_1"],
    "mixer.qkv": ["attn.Wqkv"],
    "mixer.out": ["attn.out_proj"],
    "feedforward_norm": ["norm_2"],
    "feedforward.up": ["ffn.up_proj"],
    "feedforward.down": ["ffn.down_proj"],
}
LLAMA = {
    "mixer_norm": ["input_layernorm"],
    "mixer.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
    "mixer.out": ["self_attn.o_proj"],
    "feedforward_norm": ["post_attention_layernorm"],
    "feedforward.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "feedforward.down": ["mlp.down_proj"],
}
PHI3 = LLAMA | {"mixer.qkv": ["self_attn.qkv_proj"], "feedforward.gate_up": ["mlp.gate_up_proj"]}


def peers() -> dict[str, tuple[Any, dict[str, str], dict[str, list[str]]]]:
    """The model, where its tables are, where its layers' leaves are."""
    t, old = transformers, {"n_layers": 2, "n_heads": HEADS, "d_model": DIM, "vocab_size": VOCABULARY}
    gpt2 = t.GPT2Config(n_embd=DIM, n_head=HEADS, n_layer=2, vocab_size=VOCABULARY, n_positions=LENGTH)
    opt = t.OPTConfig(**SIZES, ffn_dim=80, word_embed_proj_dim=DIM, do_layer_norm_before=True)
    mpt = t.MptConfig(**old, max_seq_len=LENGTH, no_bias=True)
    gated = SIZES | {"intermediate_size": 80, "num_key_value_heads": 2}
    stable = t.StableLmConfig(**gated, partial_rotary_factor=0.25, use_qkv_bias=True)
    ntk = t.LlamaConfig(
        **gated | {"max_position_embeddings": 20},
        rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
    )
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20, **FACTORS}
    phi3 = t.Phi3Config(**gated, rope_parameters=longrope, original_max_position_embeddings=20, pad_token_id=0)
    gpt_tables = {"": "transformer.", "embedding": "wte", "position.table": "wpe", "norm": "ln_f", "layers": "h"}
    opt_tables = {"": "model.decoder.", "position.table": "embed_positions", "norm": "final_layer_norm"}
    mpt_tables = {"": "transformer.", "embedding": "wte", "norm": "norm_f", "layers": "blocks"}
    return {
        "gpt2": (t.GPT2LMHeadModel._from_config(gpt2), gpt_tables, GPT2),
        "opt": (t.OPTForCausalLM._from_config(opt), opt_tables, OPT),
        "mpt": (t.MptForCausalLM._from_config(mpt), mpt_tables, MPT),
        "stablelm": (t.StableLmForCausalLM._from_config(stable), {}, LLAMA),
        "dynamic_ntk": (t.LlamaForCausalLM._from_config(ntk), {}, LLAMA),
        "longrope": (t.Phi3ForCausalLM._from_config(phi3), {}, PHI3),
    }


def spec(name: str) -> dict[str, Any]:
    layer_norm = {"kind": "layer", "eps": 1e-5, "bias": name != "mpt"}
    norm = {"kind": "rms", "eps": 1e-5 if name == "longrope" else 1e-6}
    mixer: dict[str, Any] = {"kind": "attention", "heads": HEADS, "position": None}
    dense: dict[str, Any] = {"kind": "dense", "dim": 80, "bias": True}
    whole: dict[str, Any] = {
        "dim": DIM,
        "vocab_size": VOCABULARY,
        "max_length": LENGTH,
        "tied": name in ("gpt2", "mpt"),
    }
    if name in ("gpt2", "opt"):
        mixer |= {"bias": True, "output_bias": True}
        whole["position"] = {"kind": "learned", "offset": 2 if name == "opt" else 0}
        dense |= {"dim": 4 * DIM, "activation": "gelu_tanh"} if name == "gpt2" else {"activation": "relu"}
    elif name == "mpt":
        mixer |= {"position": "alibi"}
        dense = {"kind": "dense", "dim": 4 * DIM, "activation": "gelu"}
    else:
        scaling = {"dynamic_ntk": NTK, "longrope": {"kind": "longrope", "original_length": 20, **FACTORS}}.get(name)
        partial = 0.25 if name == "stablelm" else 1.0
        mixer |= {"kv_heads": 2, "position": {"kind": "rope", "partial": partial, "scaling": scaling}}
        mixer["bias"] = name == "stablelm"
        dense = {"kind": "gated", "dim": 80}
    norm = norm if name in ("dynamic_ntk", "longrope") else layer_norm
    layer = {"kind": "pre_norm", "repeat": 2, "mixer": mixer, "feedforward": dense, "norm": norm}
    return whole | {"layers": [layer], "norm": norm}


def pairs(model: Transformer, tables: dict[str, str], leaves: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Each of our parameters, and the names of theirs that it is made of."""
    start = tables.get("", "model.")
    for name, _ in model.named_parameters():
        path, kind = name.rpartition(".")[::2]
        if path.startswith("layers."):
            _, index, leaf = path.split(".", 2)
            layer = f"{start}{tables.get('layers', 'layers')}.{index}"
            yield name, [part if part == "T" else f"{layer}.{part}.{kind}" for part in leaves[leaf]]
        elif path == "head":
            yield name, ["lm_head.weight"]
        else:
            yield name, [f"{start}{tables.get(path, {'embedding': 'embed_tokens'}.get(path, path))}.{kind}"]


def transposed(parts: list[str], tensors: dict[str, Tensor]) -> Tensor:
    whole = torch.cat([tensors[part] for part in parts if part != "T"])
    return whole.T if "T" in parts and whole.ndim == 2 else whole


def both(name: str) -> tuple[nn.Module, Transformer, list[tuple[str, list[str]]]]:
    torch.manual_seed(0)
    peer, tables, leaves = peers()[name]
    peer = peer.float().eval()
    model: Transformer = resolve(TransformerConfig, spec(name)).build()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        theirs, mine = dict(peer.named_parameters()), dict(model.named_parameters())
        origin = list(pairs(model, tables, leaves))
        for ours, parts in origin:
            mine[ours].copy_(transposed(parts, theirs))
    return peer, model, origin


@pytest.mark.parametrize("length", [20, 50])
@pytest.mark.parametrize("name", ["gpt2", "opt", "mpt", "stablelm", "dynamic_ntk", "longrope"])
def test_logits_and_every_gradient_equal_transformers(name: str, length: int) -> None:
    peer, model, origin = both(name)
    tokens_BS = torch.randint(2, VOCABULARY, (2, length))  # a padding token's row has no gradient with them
    expected, got = peer(tokens_BS).logits, model(tokens_BS)
    assert (got - expected).abs().max() < 3e-5
    weight = torch.randn_like(expected) / length
    for logits in (expected, got):
        (logits * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in peer.named_parameters() if parameter.grad is not None}
    for ours, parts in origin:
        reference = transposed(parts, gradients)
        assert (model.get_parameter(ours).grad - reference).abs().max() < 3e-5 * (1 + reference.abs().max()), ours


@pytest.mark.parametrize("name", ["gpt2", "opt", "mpt", "stablelm", "dynamic_ntk"])
def test_steps_with_a_cache_equal_transformers(name: str) -> None:
    peer, model, _ = both(name)
    tokens_BS = torch.randint(0, VOCABULARY, (2, 30))
    cache, theirs, start = model.make_cache(2, 30), None, 0
    for size in (15, 1, 1, 8, 1, 1, 1, 1, 1):
        piece_BS = tokens_BS[:, start : start + size]
        with torch.no_grad():
            result = peer(piece_BS, past_key_values=theirs, use_cache=True)
            positions_BS = torch.arange(start, start + size).expand(2, -1)
            got = model(piece_BS, AttentionContext(positions_BS, cache=cache))
        theirs, start = result.past_key_values, start + size
        assert (got - result.logits).abs().max() < 3e-5, start


@pytest.mark.parametrize("name", ["gpt2", "mpt", "stablelm", "dynamic_ntk", "longrope"])
def test_packed_documents_equal_each_alone(name: str) -> None:
    _, model, _ = both(name)
    lengths = [30, 1, 20, 25, 7]
    documents = [torch.randint(0, VOCABULARY, (1, n)) for n in lengths]
    numbers_BS = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed_BSV = model(torch.cat(documents, dim=1), AttentionContext.packed(numbers_BS))
        for piece_BSV, tokens_BS in zip(packed_BSV.split(lengths, dim=1), documents, strict=True):
            assert (piece_BSV - model(tokens_BS)).abs().max() < 2e-5


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 7])
def test_sinks_equal_gpt_oss(window: int | None, backend: str) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = (torch.randn(2, 20, heads, 8, requires_grad=True) for heads in (6, 2, 2))
    peer = nn.Module()
    peer.sinks, peer.num_key_value_groups = nn.Parameter(torch.randn(6)), 3
    i, j = torch.arange(20)[:, None], torch.arange(20)
    seen = (j <= i) & (j > i - (window or 20))
    mask = torch.where(seen, 0.0, float("-inf"))[None, None]
    expected, _ = eager_attention_forward(peer, *(t.transpose(1, 2) for t in (q, k, v)), mask, scaling=8**-0.5)
    sinks = peer.sinks.detach().clone().requires_grad_()
    facts = AttentionFacts(window=window, sinks=True)
    got = attend(q, k, v, facts, AttentionContext.causal(2, 20, backend=backend), sinks)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    grads = torch.autograd.grad((got * weight).sum(), (q, k, v, sinks))
    for mine, theirs in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v, peer.sinks)), strict=True):
        torch.testing.assert_close(mine, theirs)
