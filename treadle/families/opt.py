"""OPT (Zhang et al. 2022, arXiv:2205.01068), but for the 350M model, which norms after and has a narrow embedding."""

from collections.abc import Mapping
from typing import Any

from treadle.errors import ConfigError
from treadle.families.family import Family
from treadle.families.rules import Activation, Document, Fixed, Ignored, Key, Rule


class EmbeddingWidth(Rule):
    """The embedding is as wide as the model: a projection between the two has not been built."""

    names = ("word_embed_proj_dim",)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        width = config.get("word_embed_proj_dim")
        if width not in (None, document["dim"]):
            raise ConfigError(f"config.json: word_embed_proj_dim: {width} is not hidden_size={document['dim']}")

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config["word_embed_proj_dim"] = document["dim"]


BIASES = ("layers.*.mixer.bias", "layers.*.mixer.output_bias", "layers.*.feedforward.bias")

FAMILY = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    model={"norm": {"kind": "layer"}, "position": {"kind": "learned", "offset": 2}},
    layer={
        "kind": "pre_norm",
        "norm": {"kind": "layer"},
        "mixer": {"kind": "attention", "position": None},
        "feedforward": {"kind": "dense"},
    },
    rules=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "dim"),
        EmbeddingWidth(),
        Key("max_position_embeddings", "max_length", default=2048),
        Key("tie_word_embeddings", "tied", default=True),
        Key("num_attention_heads", "layers.*.mixer.heads"),
        Key("ffn_dim", "layers.*.feedforward.dim"),
        Activation("activation_function", "layers.*.feedforward.activation", default="relu"),
        Key("enable_bias", *BIASES, default=True),
        Key("layer_norm_elementwise_affine", "norm.weight", "layers.*.norm.weight", default=True),
        Fixed("do_layer_norm_before", True),
        Ignored("init_std", "layerdrop", "prefix"),
    ),
    tensors={
        "embedding": "model.decoder.embed_tokens",
        "position.table": "model.decoder.embed_positions",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
        "layers.*.mixer_norm": "model.decoder.layers.*.self_attn_layer_norm",
        "layers.*.mixer.qkv": "model.decoder.layers.*.self_attn.{part}_proj",
        "layers.*.mixer.out": "model.decoder.layers.*.self_attn.out_proj",
        "layers.*.feedforward_norm": "model.decoder.layers.*.final_layer_norm",
        "layers.*.feedforward.up": "model.decoder.layers.*.fc1",
        "layers.*.feedforward.down": "model.decoder.layers.*.fc2",
    },
)
