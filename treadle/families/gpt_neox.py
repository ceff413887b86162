"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia (arXiv:2304.01373)."""

from collections.abc import Mapping
from typing import Any

from treadle.families.family import Family
from treadle.families.layouts import QueryKeyValue
from treadle.families.rope import Rope
from treadle.families.rules import Activation, Document, Ignored, Key, Rule


class ParallelResidual(Rule):
    """Whether attention and feed-forward stand side by side, or one after the other."""

    names = ("use_parallel_residual",)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        parallel = config.get("use_parallel_residual", True)
        for layer in document["layers"]:
            layer.update({"kind": "parallel", "shared_norm": False} if parallel else {"kind": "pre_norm"})

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config["use_parallel_residual"] = document["layers"][0]["kind"] == "parallel"


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    model={"norm": {"kind": "layer"}},
    layer={
        "norm": {"kind": "layer"},
        "mixer": {"kind": "attention", "position": {"kind": "rope"}},
        "feedforward": {"kind": "dense", "bias": True},
    },
    rules=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "dim"),
        Key("max_position_embeddings", "max_length", default=2048),
        Key("tie_word_embeddings", "tied", default=False),
        Key("num_attention_heads", "layers.*.mixer.heads"),
        Key("attention_bias", "layers.*.mixer.bias", "layers.*.mixer.output_bias", default=True),
        Key("layer_norm_eps", "norm.eps", "layers.*.norm.eps", default=1e-5),
        Key("intermediate_size", "layers.*.feedforward.dim"),
        Activation("hidden_act", "layers.*.feedforward.activation", default="gelu"),
        ParallelResidual(),
        Rope(partial=0.25, legacy=("rotary_emb_base", "rotary_pct")),
        Ignored("is_decoder"),
    ),
    tensors={
        "embedding": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "layers.*.mixer_norm": "gpt_neox.layers.*.input_layernorm",
        "layers.*.mixer.qkv": QueryKeyValue("gpt_neox.layers.*.attention.query_key_value"),
        "layers.*.mixer.out": "gpt_neox.layers.*.attention.dense",
        "layers.*.feedforward_norm": "gpt_neox.layers.*.post_attention_layernorm",
        "layers.*.feedforward.up": "gpt_neox.layers.*.mlp.dense_h_to_4h",
        "layers.*.feedforward.down": "gpt_neox.layers.*.mlp.dense_4h_to_h",
    },
    prefix="gpt_neox.",
    optional=(r"(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias",),  # the causal mask, once stored
)
