"""Latent attention against transformers' DeepSeek-V2 and V3, built from their config classes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from treadle.attention import AttentionContext
from treadle.nn.latent_attention import LatentAttention, LatentAttentionConfig

transformers = pytest.importorskip("transformers")
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3  # noqa: E402

D, H, Q, C, N, R, V = 48, 4, 20, 24, 12, 8, 10
LONGEST, ORIGINAL = 256, 64
YARN = {"factor": 4.0, "mscale": 0.707, "mscale_all_dim": 0.6, "beta_fast": 8.0, "beta_slow": 1.0}


def peers(family: str, q_rank: int | None, yarn: bool, interleaved: bool, bias: bool) -> tuple[Any, Any]:
    """The attention and its rotary embedding."""
    rope: dict[str, Any] = {"rope_theta": 5000.0, "rope_type": "default"}
    if yarn:
        rope |= {**YARN, "rope_type": "yarn", "original_max_position_embeddings": ORIGINAL}
    sizes = {"q_lora_rank": q_rank, "kv_lora_rank": C, "qk_nope_head_dim": N, "qk_rope_head_dim": R, "v_head_dim": V}
    sizes |= {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": H}
    options = {"rope_parameters": rope, "max_position_embeddings": LONGEST, "attention_bias": bias}
    if family == "v3":
        config = transformers.DeepseekV3Config(**sizes, **options, rope_interleave=interleaved)
        classes = v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding
    else:
        config = transformers.DeepseekV2Config(**sizes, **options)
        classes = v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding
    config._attn_implementation = "eager"
    attention = classes[0](config, 0)
    with torch.no_grad():
        for parameter in attention.parameters():  # norms at one and biases at zero would hide a swap
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attention, classes[1](config)


def ours(q_rank: int | None, yarn: bool, interleaved: bool, bias: bool, scale: float) -> LatentAttention:
    position: dict[str, Any] = {"theta": 5000.0, "layout": "interleaved" if interleaved else "half"}
    if yarn:
        position["scaling"] = {"kind": "yarn", "original_length": ORIGINAL, **YARN}
    sizes = {"q_rank": q_rank, "kv_rank": C, "nope_dim": N, "rope_dim": R, "value_dim": V}
    spec = {"heads": H, **sizes, "position": position, "bias": bias, "scale": scale if yarn else None}
    block: LatentAttention = LatentAttentionConfig.model_validate(spec).build(D, LONGEST)
    return block


def pairs(block: LatentAttention, peer: Any, gradients: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Each piece of our weights with the view of theirs that it is a copy of; or the same of the gradients."""
    mine = {name: p.grad if gradients else p for name, p in block.named_parameters()}
    theirs = {name: p.grad if gradients else p for name, p in peer.named_parameters()}
    first = block.q_rank
    found = [(mine["kv_norm.weight"], theirs["kv_a_layernorm.weight"]), (mine["out.weight"], theirs["o_proj.weight"])]
    found += [(mine["down.weight"][first:], theirs["kv_a_proj_with_mqa.weight"])]
    if first:
        found += [(mine["down.weight"][:first], theirs["q_a_proj.weight"])]
        found += [(mine["q_norm.weight"], theirs["q_a_layernorm.weight"])]
    found += [(mine["q_up.weight"], theirs["q_b_proj.weight" if first else "q_proj.weight"])]
    heads = theirs["kv_b_proj.weight"].view(H, N + V, C)
    k, v = mine["kv_up.weight"].split((H * N, H * V))
    found += [(k.view(H, N, C), heads[:, :N]), (v.view(H, V, C), heads[:, N:])]
    if "out.bias" in mine:
        found += [(mine["out.bias"], theirs["o_proj.bias"])]
        found += [(mine["down.bias"][first:], theirs["kv_a_proj_with_mqa.bias"])]
        found += [(mine["down.bias"][:first], theirs["q_a_proj.bias"])] if first else []
    assert sum(a.numel() for a, _ in found) == sum(p.numel() for p in block.parameters())
    assert sum(b.numel() for _, b in found) == sum(p.numel() for p in peer.parameters())
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("q_rank", [Q, None])
@pytest.mark.parametrize(("family", "interleaved"), [("v2", True), ("v3", True), ("v3", False)])
def test_outputs_and_every_gradient_equal_transformers(
    family: str, interleaved: bool, q_rank: int | None, yarn: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    peer, rotary = peers(family, q_rank, yarn, interleaved, bias)
    block = ours(q_rank, yarn, interleaved, bias, peer.scaling)
    with torch.no_grad():
        for mine, theirs in pairs(block, peer):
            mine.copy_(theirs)
    S = 90
    leaves = [torch.randn(2, S, D) for _ in range(2)]
    x_BSD, y_BSD = leaves[0].clone().requires_grad_(), leaves[0].clone().requires_grad_()
    mask = torch.full((S, S), float("-inf")).triu(1)[None, None]
    table = rotary(x_BSD, torch.arange(S)[None])
    expected_BSD, _ = peer(x_BSD, attention_mask=mask, position_embeddings=table)
    got_BSD = block(y_BSD, AttentionContext.causal(2, S))
    assert (got_BSD - expected_BSD).abs().max() < 1e-5
    for out_BSD in (expected_BSD, got_BSD):
        (out_BSD * leaves[1]).mean(dim=(0, 1)).sum().backward()
    for mine, theirs in [(y_BSD.grad, x_BSD.grad), *pairs(block, peer, gradients=True)]:
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_decoding_equals_transformers_with_its_own_cache(family: str) -> None:
    torch.manual_seed(0)
    peer, rotary = peers(family, Q, True, True, False)
    block = ours(Q, True, True, False, peer.scaling)
    with torch.no_grad():
        for mine, theirs in pairs(block, peer):
            mine.copy_(theirs)
        x_BSD, S = torch.randn(2, 40, D), 40
        theirs_cache = transformers.DynamicCache()
        cache, start = block.make_cache(2, S, torch.float32, torch.device("cpu")), 0
        for size in (30, 1, 3, 1, 5):
            new_BSD, positions_BS = x_BSD[:, start : start + size], torch.arange(start, start + size).expand(2, -1)
            seen = torch.arange(start + size)[None] > positions_BS[0][:, None]
            mask = torch.zeros(seen.shape).masked_fill(seen, float("-inf"))[None, None]
            expected_BSD, _ = peer(
                new_BSD,
                attention_mask=mask,
                position_embeddings=rotary(new_BSD, positions_BS),
                past_key_values=theirs_cache,
            )
            got_BSD = block(new_BSD, AttentionContext(positions_BS, cache=cache))
            assert (got_BSD - expected_BSD).abs().max() < 1e-5
            start += size
