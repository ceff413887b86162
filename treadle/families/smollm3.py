"""SmolLM3: Llama, where every fourth layer has no positions (NoPE, arXiv:2305.19466)."""

from collections.abc import Mapping
from typing import Any

from treadle.families.family import Family
from treadle.families.llama import BIAS, EPS, FEED_FORWARD, HEAD_DIM, LAYER, MLP_BIAS, MODEL, TENSORS, sizes
from treadle.families.rope import Rope
from treadle.families.rules import Document, Ignored, Rule, Windows


class NoPositions(Rule):
    """`no_rope_layers`, which has a 1 for each layer with positions, or `no_rope_layer_interval`."""

    names = ("no_rope_layers", "no_rope_layer_interval")

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        for i, layer in enumerate(document["layers"]):
            layer["mixer"]["position"] = {"kind": "rope"} if rotates(config, i) else None

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config["no_rope_layers"] = [int(layer["mixer"]["position"] is not None) for layer in document["layers"]]


def rotates(config: Mapping[str, Any], layer: int) -> bool:
    listed = config.get("no_rope_layers")
    return bool((layer + 1) % config.get("no_rope_layer_interval", 4) if listed is None else listed[layer])


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(
        *sizes(kv_heads=4, tied=True),
        HEAD_DIM,
        EPS,
        *FEED_FORWARD,
        BIAS,
        MLP_BIAS,
        NoPositions(),
        Windows(lambda config, layer: not rotates(config, layer), window=None, switch="use_sliding_window"),
        Ignored("max_window_layers", pad_token_id=None),
        Rope(theta=2e6),
    ),
    tensors=TENSORS,
)
