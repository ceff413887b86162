"""MPT (MosaicML 2023, https://www.databricks.com/blog/mpt-7b)."""

from collections.abc import Mapping
from typing import Any

from treadle.families.family import Family
from treadle.families.rules import Document, Fixed, Ignored, Inside, Key, Rule, Width, Written

NORM = {"kind": "layer", "bias": False}


class LogitScale(Rule):
    """`logit_scale`: a number or `inv_sqrt_d_model`. The makers' code applies it; that of transformers does not."""

    names = ("logit_scale",)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        scale = config.get("logit_scale")
        document["logits_scale"] = document["dim"] ** -0.5 if scale == "inv_sqrt_d_model" else scale or 1.0

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config["logit_scale"] = None if document["logits_scale"] == 1.0 else document["logits_scale"]


class SoftmaxScale(Rule):
    """`softmax_scale`: null is 1/sqrt(head dim)."""

    names = ("softmax_scale",)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        for layer in document["layers"]:
            layer["mixer"]["scale"] = config.get("softmax_scale")

    def write(self, document: Document, config: dict[str, Any]) -> None:
        mixer = document["layers"][0]["mixer"]
        config["softmax_scale"] = None if mixer["scale"] == mixer["head_dim"] ** -0.5 else mixer["scale"]


FAMILY = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    model={"norm": NORM},
    layer={
        "kind": "pre_norm",
        "norm": NORM,
        "mixer": {"kind": "attention", "position": {"kind": "alibi"}},
        "feedforward": {"kind": "dense", "activation": "gelu"},
    },
    rules=(
        Key("vocab_size", "vocab_size"),
        Key("d_model", "dim"),
        Key("max_seq_len", "max_length", default=2048),
        Key("tie_word_embeddings", "tied", default=True),
        Key("n_heads", "layers.*.mixer.heads"),
        Key("layer_norm_epsilon", "norm.eps", "layers.*.norm.eps", default=1e-5),
        Inside(
            "attn_config",
            Key("clip_qkv", "layers.*.mixer.clip", default=None),
            SoftmaxScale(),
            Fixed("alibi", True),
            Fixed("alibi_bias_max", 8),
            Fixed("attn_type", "multihead_attention"),
            # Of how it is computed, and what transformers 4 puts into every config.
            Ignored("attn_pdrop", "attn_uses_sequence_id", "id2label", "label2id", "return_dict"),
            Written("attn_impl", "torch"),
            Ignored("length_penalty", "max_length", "num_beam_groups", "num_beams", "num_return_sequences"),
            Ignored("repetition_penalty", "temperature", "tie_word_embeddings", "top_k", "top_p", "typical_p"),
        ),
        Fixed("expansion_ratio", 4),
        Width(None),
        Fixed("no_bias", True),
        LogitScale(),
        Ignored("learned_pos_emb"),  # not where there is alibi
        Ignored("embedding_fraction", "emb_pdrop", "init_config", "init_device", "norm_type", "tokenizer_name"),
    ),
    depth="n_layers",
    tensors={
        "embedding": "transformer.wte",
        "norm": "transformer.norm_f",
        "head": "lm_head",
        "layers.*.mixer_norm": "transformer.blocks.*.norm_1",
        "layers.*.mixer.qkv": "transformer.blocks.*.attn.Wqkv",
        "layers.*.mixer.out": "transformer.blocks.*.attn.out_proj",
        "layers.*.feedforward_norm": "transformer.blocks.*.norm_2",
        "layers.*.feedforward.up": "transformer.blocks.*.ffn.up_proj",
        "layers.*.feedforward.down": "transformer.blocks.*.ffn.down_proj",
    },
    prefix="transformer.",
)
