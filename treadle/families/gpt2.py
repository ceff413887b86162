"""GPT-2 (Radford et al. 2019, Language Models are Unsupervised Multitask Learners)."""

from treadle.families.family import Family
from treadle.families.layouts import Transposed
from treadle.families.rules import Activation, Fixed, Ignored, Key, Width

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    model={"norm": {"kind": "layer"}, "position": {"kind": "learned"}},
    layer={
        "kind": "pre_norm",
        "norm": {"kind": "layer"},
        "mixer": {"kind": "attention", "position": None, "bias": True, "output_bias": True},
        "feedforward": {"kind": "dense", "bias": True},
    },
    rules=(
        Key("vocab_size", "vocab_size"),
        Key("n_embd", "dim", also=("hidden_size",)),
        Key("n_positions", "max_length", default=1024, also=("n_ctx", "max_position_embeddings")),
        Key("tie_word_embeddings", "tied", default=True),
        Key("n_head", "layers.*.mixer.heads", also=("num_attention_heads",)),
        Key("layer_norm_epsilon", "norm.eps", "layers.*.norm.eps", default=1e-5),
        Width("n_inner", said=False),
        Activation("activation_function", "layers.*.feedforward.activation", default="gelu_new"),
        Fixed("scale_attn_weights", True),
        Ignored("reorder_and_upcast_attn", "_num_labels"),
        Ignored("summary_type", "summary_use_proj", "summary_proj_to_labels", "summary_first_dropout"),
    ),
    depth="n_layer",
    depth_also=("num_hidden_layers",),
    tensors={
        "embedding": "transformer.wte",
        "position.table": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.*.mixer_norm": "transformer.h.*.ln_1",
        "layers.*.mixer.qkv": Transposed("transformer.h.*.attn.c_attn"),
        "layers.*.mixer.out": Transposed("transformer.h.*.attn.c_proj"),
        "layers.*.feedforward_norm": "transformer.h.*.ln_2",
        "layers.*.feedforward.up": Transposed("transformer.h.*.mlp.c_fc"),
        "layers.*.feedforward.down": Transposed("transformer.h.*.mlp.c_proj"),
    },
    prefix="transformer.",
    optional=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),  # the causal mask, once stored
)
