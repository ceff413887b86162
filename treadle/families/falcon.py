"""Falcon (arXiv:2311.16867) and Falcon 2 (arXiv:2407.14885)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from treadle.errors import ConfigError
from treadle.families.family import Family
from treadle.families.layouts import ByBlock, QueryKeyValue
from treadle.families.rope import Rope
from treadle.families.rules import Activation, Document, Key, Mismatch, Rule, Width
from treadle.nn.block import Parallel


class Decoder(Rule):
    """Three layers: sequential (RW), parallel after one norm (7B, 11B), parallel with a norm for each (40B, 180B).

    `new_decoder_architecture` has groups of queries, the old one all heads alike or a single key-value head.
    """

    names = (
        *("new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn"),
        *("multi_query", "num_kv_heads", "n_head_kv"),
    )

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        new = config.get("new_decoder_architecture", "n_head_kv" in config)  # the first 40B has no key for it
        norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
        if new and not config.get("parallel_attn", True):
            raise ConfigError("config.json: parallel_attn: the new decoder architecture is always parallel")
        kv_heads = config.get("num_kv_heads", config.get("n_head_kv")) if new else None
        if not new and config.get("multi_query", True):
            kv_heads = 1
        parallel = new or config.get("parallel_attn", True)
        for layer in document["layers"]:
            layer.update({"kind": "parallel", "shared_norm": norms == 1} if parallel else {"kind": "pre_norm"})
            layer["mixer"]["kv_heads"] = kv_heads

    def write(self, document: Document, config: dict[str, Any]) -> None:
        layer = document["layers"][0]
        heads, kv_heads = layer["mixer"]["heads"], layer["mixer"]["kv_heads"]
        parallel, shared = layer["kind"] == "parallel", layer.get("shared_norm", True)
        new = not shared or 1 < kv_heads < heads
        if new and not parallel:
            raise Mismatch("grouped queries go with a parallel layer only")
        config["new_decoder_architecture"], config["parallel_attn"] = new, parallel
        config["num_ln_in_parallel_attn"] = (1 if shared else 2) if new else None
        config["multi_query"] = new or kv_heads == 1
        config["num_kv_heads"] = kv_heads if new else heads


class Alibi(Rule):
    """ALiBi, which Falcon adds before it divides by sqrt(head dim); or else rotary positions."""

    names = ("alibi",)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        for layer in document["layers"]:
            head_dim = document["dim"] // layer["mixer"]["heads"]
            alibi = {"kind": "alibi", "scale": head_dim**-0.5}
            layer["mixer"]["position"] = alibi if config.get("alibi") else {"kind": "rope"}

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config["alibi"] = not rotary(document["layers"][0])


def rotary(layer: Document) -> bool:
    return (layer["mixer"].get("position") or {}).get("kind") == "rope"


def first_norm(layer: nn.Module) -> str:
    return "ln_attn" if isinstance(layer, Parallel) and layer.feedforward_norm is not None else "input_layernorm"


def second_norm(layer: nn.Module) -> str:
    return "ln_mlp" if isinstance(layer, Parallel) else "post_attention_layernorm"


FAMILY = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    model={"norm": {"kind": "layer"}},
    layer={"norm": {"kind": "layer"}, "mixer": {"kind": "attention"}, "feedforward": {"kind": "dense"}},
    rules=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "dim", also=("n_embed",)),
        Key("max_position_embeddings", "max_length", default=2048),
        Key("tie_word_embeddings", "tied", default=True),
        Key("num_attention_heads", "layers.*.mixer.heads", also=("n_head",)),
        Key("layer_norm_epsilon", "norm.eps", "layers.*.norm.eps", default=1e-5),
        Key("bias", "layers.*.feedforward.bias", "layers.*.mixer.bias", "layers.*.mixer.output_bias", default=False),
        Width("ffn_hidden_size"),
        Activation("activation", "layers.*.feedforward.activation", default="gelu"),
        Decoder(),
        Alibi(),
        Rope(where=rotary),
    ),
    depth_also=("n_layer",),
    tensors={
        "embedding": "transformer.word_embeddings",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.*.mixer_norm": ByBlock("transformer.h.*.{which}", first_norm),
        "layers.*.mixer.qkv": QueryKeyValue("transformer.h.*.self_attention.query_key_value"),
        "layers.*.mixer.out": "transformer.h.*.self_attention.dense",
        "layers.*.feedforward_norm": ByBlock("transformer.h.*.{which}", second_norm),
        "layers.*.feedforward.up": "transformer.h.*.mlp.dense_h_to_4h",
        "layers.*.feedforward.down": "transformer.h.*.mlp.dense_4h_to_h",
    },
    prefix="transformer.",
    same_as=("RefinedWeb", "RefinedWebModel"),  # as the 40B and the 7B first called themselves
)
