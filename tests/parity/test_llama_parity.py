"""The decoder against an independent one: transformers' Llama and Qwen3, built from their config classes."""

import pytest
import torch
from torch import Tensor

from treadle.attention import AttentionContext
from treadle.config import resolve
from treadle.nn.transformer import Transformer, TransformerConfig

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 131}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}


def llama(**changes: object) -> torch.nn.Module:
    config = transformers.LlamaConfig(**SIZES, **HEADS, rope_theta=5000.0, rms_norm_eps=1e-5, **changes)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")


def qwen3(**changes: object) -> torch.nn.Module:
    config = transformers.Qwen3Config(**SIZES, **HEADS, head_dim=16, rope_theta=5000.0, rms_norm_eps=1e-6, **changes)
    return transformers.Qwen3ForCausalLM._from_config(config, attn_implementation="eager")


def ours(*, qk_norm: bool, eps: float, head_dim: int | None, tied: bool) -> Transformer:
    mixer = {"kind": "attention", "heads": 6, "kv_heads": 2, "head_dim": head_dim}
    mixer |= {
        "position": {"kind": "rope", "theta": 5000.0},
        "qk_norm": {"kind": "rms", "eps": eps} if qk_norm else None,
    }
    norm = {"kind": "rms", "eps": eps}
    layer = {"kind": "pre_norm", "repeat": 3, "mixer": mixer, "feedforward": {"kind": "gated", "dim": 80}, "norm": norm}
    spec = {"dim": 48, "vocab_size": 131, "max_length": 256, "layers": [layer], "norm": norm, "tied": tied}
    return resolve(TransformerConfig, spec).build()


def copy_weights(source: torch.nn.Module, target: Transformer) -> dict[str, list[str]]:
    """Copy by name; returns which of the source's parameters each of ours is made of."""
    theirs = dict(source.named_parameters())
    origin = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    origin["head.weight"] = ["lm_head.weight"] if "lm_head.weight" in theirs else ["model.embed_tokens.weight"]
    for i in range(3):
        a, b = f"layers.{i}", f"model.layers.{i}"
        origin[f"{a}.mixer_norm.weight"] = [f"{b}.input_layernorm.weight"]
        origin[f"{a}.feedforward_norm.weight"] = [f"{b}.post_attention_layernorm.weight"]
        origin[f"{a}.mixer.qkv.weight"] = [f"{b}.self_attn.{x}_proj.weight" for x in "qkv"]
        origin[f"{a}.mixer.out.weight"] = [f"{b}.self_attn.o_proj.weight"]
        origin[f"{a}.feedforward.gate_up.weight"] = [f"{b}.mlp.{x}_proj.weight" for x in ("gate", "up")]
        origin[f"{a}.feedforward.down.weight"] = [f"{b}.mlp.down_proj.weight"]
        for x in "qk":
            origin[f"{a}.mixer.{x}_norm.weight"] = [f"{b}.self_attn.{x}_norm.weight"]
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(torch.cat([theirs[part] for part in origin[name]]))
    return origin


def gradients(model: torch.nn.Module, names: list[str]) -> Tensor:
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].grad for name in names])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_loss_and_every_gradient_equal_transformers(family: str, tied: bool) -> None:
    torch.manual_seed(0)
    qwen = family == "qwen3"
    peer = (qwen3 if qwen else llama)(tie_word_embeddings=tied).float()
    model = ours(qk_norm=qwen, eps=1e-6 if qwen else 1e-5, head_dim=16 if qwen else None, tied=tied)
    with torch.no_grad():
        for parameter in peer.parameters():  # norms at one would hide a swap
            parameter.add_(0.1 * torch.randn_like(parameter))
    origin = copy_weights(peer, model)
    tokens_BS = torch.randint(0, 131, (2, 70))

    result = peer(tokens_BS, labels=tokens_BS)
    result.loss.backward()
    targets_BS = torch.cat((tokens_BS[:, 1:], torch.full((2, 1), -100)), dim=1)
    loss = model.head.cross_entropy(model.hidden(tokens_BS), targets_BS) / (targets_BS != -100).sum()
    loss.backward()

    assert (model(tokens_BS) - result.logits).abs().max() < 1e-5
    assert abs(loss.item() - result.loss.item()) < 1e-5
    for name, parameter in model.named_parameters():
        reference = gradients(peer, origin[name])
        assert (parameter.grad - reference).abs().max() < 1e-5, name


def test_packed_documents_equal_each_document_alone() -> None:
    torch.manual_seed(0)
    model = ours(qk_norm=False, eps=1e-5, head_dim=None, tied=False).initialise(0)
    lengths = [1, 17, 30, 2]
    documents = [torch.randint(0, 131, (1, n)) for n in lengths]
    numbers_BS = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed_BSV = model(torch.cat(documents, dim=1), AttentionContext.packed(numbers_BS))
    for piece_BSV, tokens_BS in zip(packed_BSV.split(lengths, dim=1), documents, strict=True):
        assert (piece_BSV - model(tokens_BS)).abs().max() < 1e-5
