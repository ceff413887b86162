"""Granite 3 (arXiv:2405.04324 is its predecessor): Llama with four multipliers from muP."""

from treadle.families.family import Family
from treadle.families.llama import BIAS, EPS, FEED_FORWARD, HEAD_DIM, LAYER, MLP_BIAS, MODEL, SIZES, TENSORS
from treadle.families.rope import Rope
from treadle.families.rules import Key, inverse

FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(
        *SIZES,
        HEAD_DIM,
        EPS,
        *FEED_FORWARD,
        BIAS,
        MLP_BIAS,
        Key("embedding_multiplier", "embedding_scale", default=1.0),
        Key("attention_multiplier", "layers.*.mixer.scale", default=1.0),
        Key("residual_multiplier", "layers.*.residual_scale", default=1.0),
        Key("logits_scaling", "logits_scale", default=1.0, to=inverse(-1), back=inverse(-1)),
        Rope(),
    ),
    tensors=TENSORS,
)
