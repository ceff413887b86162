"""BLOOM (Le Scao et al. 2022, arXiv:2211.05100)."""

from treadle.families.family import Family
from treadle.families.layouts import QueryKeyValue
from treadle.families.rules import Ignored, Key, Width

FAMILY = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    model={"norm": {"kind": "layer"}, "embedding_norm": {"kind": "layer"}},
    layer={
        "kind": "pre_norm",
        "norm": {"kind": "layer"},
        "mixer": {"kind": "attention", "position": {"kind": "alibi"}, "bias": True, "output_bias": True},
        "feedforward": {"kind": "dense", "activation": "gelu_tanh", "bias": True},
    },
    rules=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "dim", also=("n_embed",)),
        Key("seq_length", "max_length", default=2048),  # known to the published models, not to transformers
        Key("tie_word_embeddings", "tied", default=True),
        Key("n_head", "layers.*.mixer.heads", also=("num_attention_heads",)),
        Key("layer_norm_epsilon", "norm.eps", "embedding_norm.eps", "layers.*.norm.eps", default=1e-5),
        Width(None),
        Ignored("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "slow_but_exact"),
        Ignored("offset_alibi", "skip_bias_add", "skip_bias_add_qkv"),  # of the trainer
    ),
    depth="n_layer",
    depth_also=("num_hidden_layers",),
    tensors={
        "embedding": "transformer.word_embeddings",
        "embedding_norm": "transformer.word_embeddings_layernorm",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.*.mixer_norm": "transformer.h.*.input_layernorm",
        "layers.*.mixer.qkv": QueryKeyValue("transformer.h.*.self_attention.query_key_value"),
        "layers.*.mixer.out": "transformer.h.*.self_attention.dense",
        "layers.*.feedforward_norm": "transformer.h.*.post_attention_layernorm",
        "layers.*.feedforward.up": "transformer.h.*.mlp.dense_h_to_4h",
        "layers.*.feedforward.down": "transformer.h.*.mlp.dense_4h_to_h",
    },
    prefix="transformer.",
)
