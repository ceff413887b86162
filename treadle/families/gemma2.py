"""Gemma 2 (arXiv:2408.00118): every second layer is local, four norms in each, capped scores and capped logits.

The embedding is multiplied by sqrt(dim). transformers rounds that factor to the dtype of the weights first, which in
bf16 is up to 0.4 % off; here it is not rounded.
"""

from treadle.families.family import Family
from treadle.families.layouts import Layout
from treadle.families.llama import ATTENTION, BIAS, EMBEDDINGS, EPS, GATED, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Activation, Follows, Ignored, Key, Rule, Windows, inverse

NORM = {"kind": "rms", "offset": 1.0}
LAYER = {
    "kind": "sandwich",
    "norm": NORM,
    "mixer": {"kind": "attention", "position": {"kind": "rope"}},
    "feedforward": {"kind": "gated"},
}

RULES: tuple[Rule, ...] = (
    *sizes(kv_heads=4, tied=True),
    Follows("embedding_scale", lambda config: config["hidden_size"] ** 0.5),
    Key("head_dim", "layers.*.mixer.head_dim", default=256),
    EPS,
    Key("intermediate_size", "layers.*.feedforward.dim"),
    Activation("hidden_activation", "layers.*.feedforward.activation", default="gelu_pytorch_tanh"),
    BIAS,
    Key("query_pre_attn_scalar", "layers.*.mixer[attention].scale", default=256, to=inverse(-0.5), back=inverse(-2)),
    Ignored("hidden_act"),
)
TENSORS: dict[str, str | Layout] = {
    **EMBEDDINGS,
    **ATTENTION,
    **GATED,
    "layers.*.mixer_norm": "model.layers.*.input_layernorm",
    "layers.*.mixer_output_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.feedforward_norm": "model.layers.*.pre_feedforward_layernorm",
    "layers.*.feedforward_output_norm": "model.layers.*.post_feedforward_layernorm",
}

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    model={"norm": NORM},
    layer=LAYER,
    rules=(
        *RULES,
        Key("attn_logit_softcapping", "layers.*.mixer.softcap", default=50.0),
        Key("final_logit_softcapping", "softcap", default=30.0),
        Windows(lambda config, layer: layer % 2 == 0, window=4096),
        Ignored("sliding_window_size"),
        Rope(),
    ),
    tensors=TENSORS,
)
