"""Phi 3, 3.5 and 4 (arXiv:2404.14219, arXiv:2503.01743): Llama with stacked projections and LongRoPE."""

from typing import Any

from treadle.families.family import Family
from treadle.families.llama import ATTENTION, EMBEDDINGS, FEED_FORWARD, GATED, LAYER, MODEL, NORMS, eps, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Ignored, Key


class Phi3Rope(Rope):
    """transformers 4 takes `type` and the two lists of factors in rope_scaling, and nothing else."""

    def _write_legacy(self, parameters: dict[str, Any], config: dict[str, Any]) -> None:
        super()._write_legacy(parameters, config)
        if config["rope_scaling"] is not None and parameters.keys() <= KNOWN:
            factors = {key: parameters[key] for key in ("short_factor", "long_factor")}
            config["rope_scaling"] = {"type": parameters["rope_type"], **factors}


KNOWN = {"rope_type", "rope_theta", "partial_rotary_factor", "short_factor", "long_factor"}
KNOWN |= {"original_max_position_embeddings"}

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(
        *sizes(),
        eps(1e-5),
        *FEED_FORWARD,
        Key("sliding_window", "layers.*.mixer.window", default=None),
        Ignored(pad_token_id=None),
        Phi3Rope(partial=1.0, renamed={"su": "longrope", "yarn": "longrope"}),
    ),
    tensors={
        **EMBEDDINGS,
        **ATTENTION,
        **NORMS,
        **GATED,
        "layers.*.mixer.qkv": "model.layers.*.self_attn.qkv_proj",
        "layers.*.feedforward.gate_up": "model.layers.*.mlp.gate_up_proj",
    },
)
