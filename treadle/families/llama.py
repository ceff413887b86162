"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), of which many families are variations."""

from typing import Any

from treadle.families.family import Family
from treadle.families.layouts import Layout
from treadle.families.rope import Rope
from treadle.families.rules import Activation, HeadDim, Key, Rule

LAYER = {
    "kind": "pre_norm",
    "norm": {"kind": "rms"},
    "mixer": {"kind": "attention", "position": {"kind": "rope"}},
    "feedforward": {"kind": "gated"},
}
MODEL = {"norm": {"kind": "rms"}}


def sizes(*, kv_heads: Any = None, tied: bool = False) -> tuple[Rule, ...]:
    """kv_heads, tied: what a config.json means that leaves the key out."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "dim"),
        Key("max_position_embeddings", "max_length"),
        Key("tie_word_embeddings", "tied", default=tied),
        Key("num_attention_heads", "layers.*.mixer.heads"),
        Key("num_key_value_heads", "layers.*.mixer.kv_heads", default=kv_heads),
    )


def eps(default: float = 1e-6) -> Key:
    return Key("rms_norm_eps", "norm.eps", "layers.*.norm.eps", "layers.*.mixer.qk_norm.eps", default=default)


SIZES = sizes()
HEAD_DIM = HeadDim()
EPS = eps()
FEED_FORWARD: tuple[Rule, ...] = (
    Key("intermediate_size", "layers.*.feedforward[gated].dim"),
    Activation("hidden_act", "layers.*.feedforward.activation", default="silu"),
)
BIAS = Key("attention_bias", "layers.*.mixer.bias", "layers.*.mixer.output_bias", default=False)
MLP_BIAS = Key("mlp_bias", "layers.*.feedforward.bias", default=False)

EMBEDDINGS: dict[str, str | Layout] = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
ATTENTION: dict[str, str | Layout] = {
    "layers.*.mixer.qkv": "model.layers.*.self_attn.{part}_proj",
    "layers.*.mixer.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.mixer.k_norm": "model.layers.*.self_attn.k_norm",
    "layers.*.mixer.out": "model.layers.*.self_attn.o_proj",
}
NORMS: dict[str, str | Layout] = {
    "layers.*.mixer_norm": "model.layers.*.input_layernorm",
    "layers.*.feedforward_norm": "model.layers.*.post_attention_layernorm",
}
GATED: dict[str, str | Layout] = {
    "layers.*.feedforward.gate_up": "model.layers.*.mlp.{part}_proj",
    "layers.*.feedforward.down": "model.layers.*.mlp.down_proj",
}
TENSORS = {**EMBEDDINGS, **ATTENTION, **NORMS, **GATED}

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(*SIZES, HEAD_DIM, EPS, *FEED_FORWARD, BIAS, MLP_BIAS, Rope()),
    tensors=TENSORS,
)
