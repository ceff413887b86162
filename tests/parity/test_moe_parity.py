"""Mixtures of experts against transformers': one block with copied weights, and whole decoders."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle.config import Config, resolve
from treadle.nn.config import FeedForwardConfig
from treadle.nn.moe import MoE
from treadle.nn.transformer import TransformerConfig

transformers = pytest.importorskip("transformers")

D, F, E, K = 16, 8, 8, 3


class Part(Config):
    feedforward: FeedForwardConfig


def ours(**options: Any) -> MoE:
    spec = {"kind": "moe", "experts": E, "top_k": K, "dim": F, **options}
    block: MoE = resolve(Part, {"feedforward": spec}).feedforward.build(D)
    return block


SIZES = {"hidden_size": D, "hidden_act": "silu", "num_experts_per_tok": K, "num_attention_heads": 4}
DEEPSEEK = {"moe_intermediate_size": F, "n_routed_experts": E, "num_local_experts": E, "n_shared_experts": 2}
GROUPED = {"n_group": 4, "topk_group": 2}
SHARED = {"kind": "gated", "dim": 2 * F}

# name: transformers' module, its block, its config and arguments, our options
BLOCKS: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        "MixtralSparseMoeBlock",
        "MixtralConfig",
        {"num_local_experts": E, "intermediate_size": F},
        {},
    ),
    "qwen3": (
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        {"num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": True},
        {},
    ),
    "qwen2": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        {
            "num_experts": E,
            "moe_intermediate_size": F,
            "shared_expert_intermediate_size": 2 * F,
            "norm_topk_prob": False,
        },
        {"router": {"kind": "softmax", "normalise": False}, "shared": SHARED, "shared_gate": True},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        {**DEEPSEEK, **GROUPED, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        {
            "router": {"kind": "sigmoid", "scale": 2.5, "groups": {"count": 4, "keep": 2}},
            "shared": SHARED,
            "balance_bias": 0.001,
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        "DeepseekV2Moe",
        "DeepseekV2Config",
        {**DEEPSEEK, **GROUPED, "routed_scaling_factor": 1.5, "topk_method": "group_limited_greedy"},
        {
            "router": {
                "kind": "softmax",
                "normalise": False,
                "scale": 1.5,
                "groups": {"count": 4, "keep": 2, "score": "max"},
            },
            "shared": SHARED,
        },
    ),
}


def copy_block(peer: nn.Module, block: MoE) -> None:
    theirs: dict[str, Tensor] = {**dict(peer.named_parameters()), **dict(peer.named_buffers())}
    pairs = {"router.gate.weight": "gate.weight", "gate_up.weight": "experts.gate_up_proj"}
    pairs |= {"down.weight": "experts.down_proj", "router.balance_bias": "gate.e_score_correction_bias"}
    pairs |= {"shared_gate.weight": "shared_expert_gate.weight"}
    shared = "shared_experts" if any(name.startswith("shared_experts.") for name in theirs) else "shared_expert"
    pairs["shared.down.weight"] = f"{shared}.down_proj.weight"
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name == "shared.gate_up.weight":
                parameter.copy_(torch.cat([theirs[f"{shared}.{x}_proj.weight"] for x in ("gate", "up")]))
            else:
                parameter.copy_(theirs[pairs[name]])


@pytest.mark.parametrize("compute", ["loop", "grouped"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_and_gradients_equal_transformers(name: str, compute: str) -> None:
    torch.manual_seed(0)
    module, block_name, config_name, arguments, options = BLOCKS[name]
    config = getattr(transformers, config_name)(**SIZES, **arguments, experts_implementation="eager")
    peer = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), block_name)(config)
    for tensor in (*peer.parameters(), *peer.buffers()):
        nn.init.normal_(tensor, std=0.3)
    block = ours(compute=compute, **options)
    copy_block(peer, block)
    x = torch.randn(2, 9, D, requires_grad=True)
    weight = torch.randn(2, 9, D)
    expected, found = peer(x), block(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x, retain_graph=True)
    (got,) = torch.autograd.grad((found * weight).sum(), x, retain_graph=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    for mine, theirs in (
        (block.router.gate.weight, peer.gate.weight),
        (block.gate_up.weight, peer.experts.gate_up_proj),
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.down.weight.grad, peer.experts.down_proj.grad, rtol=1e-4, atol=1e-5)


def test_balance_loss_is_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(0)
    block = ours()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(40, D)
    routing = block.router(x)
    _, counts, _ = block.mix(x, routing)
    balance, z = block.losses(routing, counts)
    expected = load_balancing_loss_func((routing.logits_TE,), E, K)
    torch.testing.assert_close(balance / 40, expected)
    torch.testing.assert_close(z / 40, routing.logits_TE.exp().sum(-1).log().square().mean())


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_logits_equal_transformers(family: str) -> None:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 67,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
    }
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    experts = {"num_local_experts": 4, "intermediate_size": 24}
    if family == "Qwen3Moe":
        experts = {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
    config = getattr(transformers, f"{family}Config")(**shape, **experts, rope_theta=5000.0)
    peer = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    norm = {"kind": "rms", "eps": 1e-6}
    mixer = {
        "kind": "attention",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "position": {"kind": "rope", "theta": 5000.0},
    }
    mixer["qk_norm"] = norm if family == "Qwen3Moe" else None
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "dim": 24}
    layer = {"kind": "pre_norm", "repeat": 2, "mixer": mixer, "feedforward": moe, "norm": norm}
    plain = {"dim": 32, "vocab_size": 67, "max_length": 64, "norm": norm}
    model = resolve(TransformerConfig, {**plain, "layers": [layer]}).build()
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.embedding.weight.copy_(theirs["model.embed_tokens.weight"])
        model.norm.weight.copy_(theirs["model.norm.weight"])
        model.head.weight.copy_(theirs["lm_head.weight"])
        for i, ours_layer in model.layers.items():
            peer_layer = peer.model.layers[int(i)]
            ours_layer.mixer_norm.weight.copy_(peer_layer.input_layernorm.weight)
            ours_layer.feedforward_norm.weight.copy_(peer_layer.post_attention_layernorm.weight)
            attention = peer_layer.self_attn
            ours_layer.mixer.qkv.weight.copy_(torch.cat([getattr(attention, f"{x}_proj").weight for x in "qkv"]))
            ours_layer.mixer.out.weight.copy_(attention.o_proj.weight)
            if ours_layer.mixer.q_norm is not None:
                ours_layer.mixer.q_norm.weight.copy_(attention.q_norm.weight)
                ours_layer.mixer.k_norm.weight.copy_(attention.k_norm.weight)
            copy_block(peer_layer.mlp, ours_layer.feedforward)
    tokens_BS = torch.randint(0, 67, (2, 33))
    assert (model(tokens_BS) - peer(tokens_BS).logits).abs().max() < 1e-5
