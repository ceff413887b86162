"""Kinds of layers against transformers' own: its mixer, feed-forward and norms, put into our wiring, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.config import resolve
from treadle.nn.norm import RMSNormConfig
from treadle.nn.roles import parameter_roles
from treadle.nn.transformer import TransformerConfig

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
TWO = {"mixer_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}


class Mixer(nn.Module):
    """Transformers' attention in place of ours."""

    def __init__(self, attention: nn.Module, extra: dict[str, Any]):
        super().__init__()
        self.attention, self.extra = attention, extra

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        return self.attention(hidden_states=x, attention_mask=None, **self.extra)[0]


def layer(kind: str, **options: Any) -> nn.Module:
    plain = {"kind": kind, "mixer": {"kind": "attention", "heads": 4}, "feedforward": {"kind": "dense", "dim": 8}}
    spec = {"dim": 16, "vocab_size": 8, "max_length": 32, "layers": [{**plain, **options}]}
    return resolve(TransformerConfig, spec).build().layers["0"]


CASES = {
    "llama": ("Llama", "LlamaDecoderLayer", GROUPED, {}, {"kind": "pre_norm"}, TWO),
    "granite": (
        "Granite",
        "GraniteDecoderLayer",
        GROUPED,
        {"residual_multiplier": 0.22},
        {"kind": "pre_norm", "residual_scale": 0.22},
        TWO,
    ),
    "olmo2": (
        "Olmo2",
        "Olmo2DecoderLayer",
        GROUPED,
        {},
        {"kind": "reordered_norm"},
        {"mixer_norm": "post_attention_layernorm", "feedforward_norm": "post_feedforward_layernorm"},
    ),
    "gemma2": (
        "Gemma2",
        "Gemma2DecoderLayer",
        GROUPED,
        {},
        {"kind": "sandwich"},
        {
            "mixer_norm": "input_layernorm",
            "mixer_output_norm": "post_attention_layernorm",
            "feedforward_norm": "pre_feedforward_layernorm",
            "feedforward_output_norm": "post_feedforward_layernorm",
        },
    ),
    "phi": ("Phi", "PhiDecoderLayer", SIZES, {}, {"kind": "parallel"}, {"mixer_norm": "input_layernorm"}),
    "gpt_neox": ("GPTNeoX", "GPTNeoXLayer", SIZES, {}, {"kind": "parallel", "shared_norm": False}, TWO),
}


@pytest.mark.parametrize("name", CASES)
def test_wiring_and_gradients_equal_transformers(name: str) -> None:
    torch.manual_seed(0)
    family, layer_name, sizes, extra, ours_config, norms = CASES[name]
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=[layer_name])
    config = getattr(transformers, f"{family}Config")(**sizes, **extra, attn_implementation="eager")
    peer = getattr(module, layer_name)(config, 0).double().eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x_BSD = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(7)[None]
    rotary = getattr(module, f"{family}RotaryEmbedding")(config)
    tables = tuple(table.double() for table in rotary(x_BSD, positions))

    ours = layer(**ours_config)
    arguments = {"position_embeddings": tables, "position_ids": positions}
    ours.mixer = Mixer(getattr(peer, "self_attn", None) or peer.attention, arguments)
    ours.feedforward = peer.mlp
    for mine, theirs in norms.items():
        setattr(ours, mine, getattr(peer, theirs))
    assert {n for n, _ in ours.named_children()} == {"mixer", "feedforward", *norms}

    context = AttentionContext.causal(2, 7)
    expected = peer(x_BSD, attention_mask=None, **arguments)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = ours(x_BSD, context)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x_BSD)
    (got,) = torch.autograd.grad((found * weight).sum(), x_BSD)
    torch.testing.assert_close(got, wanted)


def test_post_norm_is_the_original_formula() -> None:
    ours = layer("post_norm", norm="layer", residual_scale=0.5).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    x, context = torch.randn(2, 5, 16, dtype=torch.float64), AttentionContext.causal(2, 5)
    tables = {ours.mixer.position.key: ours.mixer.position.tables(context)}
    context.tables.update(tables)

    def norm(values: Tensor, block: nn.Module) -> Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.weight + block.bias

    middle = norm(x + 0.5 * ours.mixer(x, context), ours.mixer_norm)
    expected = norm(middle + 0.5 * ours.feedforward(middle), ours.feedforward_norm)
    torch.testing.assert_close(ours(x, context), expected)


def test_rms_offset_is_gemmas_norm() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    ours, peer = RMSNormConfig(eps=1e-6, offset=1.0).build(16), Gemma2RMSNorm(16, eps=1e-6)
    assert torch.equal(ours.weight, peer.weight)
    nn.init.normal_(ours.weight)
    with torch.no_grad():
        peer.weight.copy_(ours.weight)
    x = torch.randn(3, 16)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.bfloat16()(x.bfloat16()), peer.bfloat16()(x.bfloat16())), "rounded once, at the end"


def test_rms_offset_with_a_weight_for_each_head_is_rounded_once() -> None:
    ours = RMSNormConfig(eps=1e-6, offset=1.0).build(64, 3)
    nn.init.normal_(ours.weight, std=0.1)
    ours, x = ours.bfloat16(), torch.randn(5, 3, 64).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + ours.weight.double())
    assert (ours(x) != exact.to(torch.bfloat16)).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["pre_norm", "post_norm", "reordered_norm", "sandwich", "parallel"])
def test_every_kind_starts_with_plain_norms_and_knows_its_roles(kind: str) -> None:
    mixer = {"kind": "attention", "heads": 4, "qk_norm": {"kind": "rms", "offset": 1.0}}
    one = {"kind": kind, "repeat": 2, "mixer": mixer, "feedforward": {"kind": "dense", "dim": 8}}
    plain = {"dim": 16, "vocab_size": 8, "max_length": 32}
    norms = {}
    for offset in (0.0, 1.0):
        norm = {"kind": "rms", "offset": offset}
        config = resolve(TransformerConfig, {**plain, "layers": [{**one, "norm": norm}], "norm": norm})
        model = config.build().initialise(0)
        assert set(parameter_roles(model).values()) == {"column", "row", "vocab", "norm"}
        norms[offset] = model(torch.arange(8)[None])
        assert all(p.eq(1.0 - offset).all() for n, p in model.named_parameters() if n.startswith("norm"))
    torch.testing.assert_close(norms[0.0], norms[1.0])
