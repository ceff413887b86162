"""Gated delta net against transformers' Qwen3-Next: the recurrence, the module with copied weights, a decoder."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.config import resolve
from treadle.kernels.gated_delta_rule import chunked, recurrent
from treadle.nn.gated_delta import GatedDelta, GatedDeltaConfig
from treadle.nn.transformer import TransformerConfig

transformers = pytest.importorskip("transformers")
qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

D, H, R, K, V, W = 48, 2, 2, 16, 24, 4
LINEAR = {
    "linear_num_key_heads": H,
    "linear_num_value_heads": H * R,
    "linear_key_head_dim": K,
    "linear_value_head_dim": V,
    "linear_conv_kernel_dim": W,
}
NORM = {"kind": "rms", "eps": 1e-6}
MIXER = {"kind": "gated_delta", "heads": H, "value_heads": H * R, "head_dim": K, "value_dim": V, "conv": W}


def peer_config(**changes: Any) -> Any:
    return transformers.Qwen3NextConfig(
        hidden_size=D, num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=1e-6, **{**LINEAR, **changes}
    )


def ours() -> GatedDelta:
    block: GatedDelta = GatedDeltaConfig(**{**MIXER, "norm": NORM}).build(D, 64)
    return block


def rows(theirs: Tensor, name: str) -> Tensor:
    """Their rows (or the gradient of them) of one projection: they interleave the projections by key head."""
    sizes = {"q": K, "k": K, "v": R * V, "z": R * V} if name in "qkvz" else {"b": R, "a": R}
    by_head = theirs.unflatten(0, (H, -1)).split(list(sizes.values()), dim=1)
    return dict(zip(sizes, by_head, strict=True))[name].flatten(0, 1)


def paired(block: GatedDelta, peer: nn.Module, of: Any) -> list[tuple[Tensor, Tensor]]:
    """Our parameters beside theirs, in our layout; `of` picks the value or the gradient."""
    theirs = {name: of(parameter) for name, parameter in peer.named_parameters()}
    qkvz, ba = theirs["in_proj_qkvz.weight"], theirs["in_proj_ba.weight"]
    return [
        (of(block.qkvz.weight), torch.cat([rows(qkvz, name) for name in "qkvz"])),
        (of(block.ba.weight), torch.cat([rows(ba, name) for name in "ba"])),
        (of(block.conv.weight), theirs["conv1d.weight"]),
        (of(block.A_log), theirs["A_log"]),
        (of(block.dt_bias), theirs["dt_bias"]),
        (of(block.norm.weight), theirs["norm.weight"]),
        (of(block.out.weight), theirs["out_proj.weight"]),
    ]


def copy_block(block: GatedDelta, peer: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in paired(block, peer, lambda parameter: parameter.data):
            mine.copy_(theirs)


def scramble(peer: nn.Module) -> None:
    """Weights large enough that every part matters. Stronger decays would measure the digits that their chunks lose."""
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.3)
        for module in peer.modules():
            if isinstance(module, qwen.Qwen3NextGatedDeltaNet):
                module.A_log.uniform_(-4, 0)
                module.dt_bias.uniform_(-3, 1)
                module.norm.weight.add_(1)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("length", [1, 7, 64, 150])
@pytest.mark.parametrize("form", [chunked, recurrent])
def test_recurrence_equals_both_of_transformers(form: Any, length: int) -> None:
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(2, length, H, K), dim=-1) for _ in "qk")
    v = torch.randn(2, length, H * R, V)
    log_decay, beta = -torch.rand(2, length, H * R) * 2, torch.rand(2, length, H * R)
    state = torch.randn(2, H * R, K, V)
    starts = torch.zeros(2, length, dtype=torch.bool)
    y, last = form(q * K**-0.5, k, v, log_decay, beta, starts, state)
    for theirs in (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule):
        wanted, wanted_last = theirs(
            q, k, v, g=log_decay, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=False
        )
        assert error(y, wanted) < 1e-5  # their chunks lose 2e-6 to differences of sums
        assert error(last, wanted_last) < 1e-5


@pytest.mark.parametrize("length", [1, 9, 64, 130])
def test_module_and_gradients_equal_transformers(length: int) -> None:
    torch.manual_seed(1)
    peer = qwen.Qwen3NextGatedDeltaNet(peer_config(), 0)
    scramble(peer)
    block = ours()
    copy_block(block, peer)
    x, weight = torch.randn(2, length, D), torch.randn(2, length, D)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = block(mine, AttentionContext.causal(2, length)), peer(theirs)
    assert error(found, expected) < 1e-5
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for got, wanted in [(mine.grad, theirs.grad), *paired(block, peer, lambda parameter: parameter.grad)]:
        assert error(got, wanted) < 1e-5


def test_logits_of_a_stack_equal_transformers() -> None:
    torch.manual_seed(2)
    stack = {"hidden_size": D, "num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3, "rms_norm_eps": 1e-6}
    dense = {"vocab_size": 67, "intermediate_size": 40, "mlp_only_layers": [0, 1, 2], "num_attention_heads": 4}
    config = transformers.Qwen3NextConfig(**stack, **dense, **LINEAR)
    peer = transformers.Qwen3NextForCausalLM(config).eval()
    scramble(peer)
    norm = {**NORM, "offset": 1.0}
    layer = {"kind": "pre_norm", "repeat": 3, "norm": norm, "mixer": {**MIXER, "norm": NORM}}
    layer["feedforward"] = {"kind": "gated", "dim": 40}
    spec = {"dim": D, "vocab_size": 67, "max_length": 128, "norm": norm, "layers": [layer]}
    model = resolve(TransformerConfig, spec).build()
    with torch.no_grad():
        model.embedding.weight.copy_(peer.model.embed_tokens.weight)
        model.norm.weight.copy_(peer.model.norm.weight)
        model.head.weight.copy_(peer.lm_head.weight)
        for index, mine in model.layers.items():
            theirs = peer.model.layers[int(index)]
            mine.mixer_norm.weight.copy_(theirs.input_layernorm.weight)
            mine.feedforward_norm.weight.copy_(theirs.post_attention_layernorm.weight)
            mine.feedforward.gate_up.weight.copy_(torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight]))
            mine.feedforward.down.weight.copy_(theirs.mlp.down_proj.weight)
            copy_block(mine.mixer, theirs.linear_attn)
    tokens = torch.randint(0, 67, (2, 90))
    with torch.no_grad():
        assert error(model(tokens), peer(tokens, use_cache=False).logits) < 1e-5
