"""What DeepSeek-V2 and V3 share: latent attention, a dense feed-forward in the first layers and experts after."""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from treadle.errors import ConfigError
from treadle.families.layouts import ByBlock, HeadByHead, Layout, Plain
from treadle.families.llama import EMBEDDINGS, EPS, NORMS
from treadle.families.rope import Rope
from treadle.families.rules import Document, Ignored, Key, Mismatch, Rule, places

MOE = "layers.*.feedforward[moe]"


class KeyValueHeads(Rule):
    """`num_key_value_heads`, which latent attention has as many of as query heads."""

    names = ("num_key_value_heads",)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        heads, wanted = config.get("num_key_value_heads"), document["layers"][0]["mixer"]["heads"]
        if heads not in (None, wanted):
            raise ConfigError(f"config.json: num_key_value_heads: {heads} is not num_attention_heads={wanted}")

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config["num_key_value_heads"] = document["layers"][0]["mixer"]["heads"]


class YarnScale(Rule):
    """The attention's scale under YaRN: (0.1 mscale_all_dim ln(factor) + 1)^2 / sqrt(head dim). It has no key."""

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        for layer in document["layers"]:
            mixer = layer["mixer"]
            scaling = mixer["position"]["scaling"] or {}
            if scaling.get("mscale_all_dim"):
                factor = scaling.get("factor") or document["max_length"] / scaling["original_length"]
                magnitude = 0.1 * scaling["mscale_all_dim"] * math.log(max(factor, 1)) + 1
                mixer["scale"] = (mixer["nope_dim"] + mixer["rope_dim"]) ** -0.5 * magnitude**2

    def write(self, document: Document, config: dict[str, Any]) -> None:
        pass


class DenseFirst(Rule):
    """`first_k_dense_replace`: the layers before those with experts."""

    names = ("first_k_dense_replace",)

    def __init__(self, moe: Mapping[str, Any], *, default: int):
        self.moe, self.default = moe, default

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        for layer in document["layers"][config.get("first_k_dense_replace", self.default) :]:
            layer["feedforward"] = deepcopy(dict(self.moe))

    def write(self, document: Document, config: dict[str, Any]) -> None:
        kinds = [layer["feedforward"]["kind"] for layer in document["layers"]]
        config["first_k_dense_replace"] = kinds.index("moe") if "moe" in kinds else len(kinds)


class SharedExperts(Rule):
    """`n_shared_experts`: of the experts' width each, in one matrix."""

    names = ("n_shared_experts",)

    def __init__(self, default: int):
        self.default = default

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        count = config.get("n_shared_experts", self.default)
        for moe, key in places(document, f"{MOE}.shared"):
            moe[key] = {"kind": "gated", "dim": count * moe["dim"]} if count else None

    def write(self, document: Document, config: dict[str, Any]) -> None:
        for moe, key in places(document, f"{MOE}.shared"):
            if not moe[key]:
                raise Mismatch("its experts have no shared one beside them")
            if moe[key]["dim"] % moe["dim"]:
                raise Mismatch(f"its shared dim={moe[key]['dim']} is no multiple of the experts' dim={moe['dim']}")
            config["n_shared_experts"] = moe[key]["dim"] // moe["dim"]


LAYER = {
    "kind": "pre_norm",
    "norm": {"kind": "rms"},
    "mixer": {"kind": "latent_attention", "position": {"kind": "rope", "layout": "interleaved"}},
    "feedforward": {"kind": "gated"},
}

SIZES: tuple[Rule, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "dim"),
    Key("tie_word_embeddings", "tied", default=False),
    EPS,
)
ATTENTION: tuple[Rule, ...] = (
    Key("num_attention_heads", "layers.*.mixer.heads"),
    KeyValueHeads(),
    Key("q_lora_rank", "layers.*.mixer.q_rank", default=1536),
    Key("kv_lora_rank", "layers.*.mixer.kv_rank", default=512),
    Key("qk_nope_head_dim", "layers.*.mixer.nope_dim", default=128),
    Key("qk_rope_head_dim", "layers.*.mixer.rope_dim", default=64),
    Key("v_head_dim", "layers.*.mixer.value_dim", default=128),
    Key("attention_bias", "layers.*.mixer.bias", default=False),
    Rope(),
    YarnScale(),
)
SILENT = Ignored("head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size")  # derived, or of the training


def expanded_queries(mixer: nn.Module) -> str:
    return "q_b_proj" if mixer.q_norm is not None else "q_proj"


TENSORS: dict[str, str | Layout] = {
    **EMBEDDINGS,
    **NORMS,
    "layers.*.mixer.down": Plain(
        "model.layers.*.self_attn.{part}", q="q_a_proj", kv="kv_a_proj_with_mqa", k_rope="kv_a_proj_with_mqa"
    ),
    "layers.*.mixer.q_norm": "model.layers.*.self_attn.q_a_layernorm",
    "layers.*.mixer.q_up": ByBlock("model.layers.*.self_attn.{which}", expanded_queries),
    "layers.*.mixer.kv_norm": "model.layers.*.self_attn.kv_a_layernorm",
    "layers.*.mixer.kv_up": HeadByHead("model.layers.*.self_attn.kv_b_proj"),
    "layers.*.mixer.out": "model.layers.*.self_attn.o_proj",
    "layers.*.feedforward.router.gate": "model.layers.*.mlp.gate",
    "layers.*.feedforward.gate_up": "model.layers.*.mlp.{experts}{part}_proj",
    "layers.*.feedforward.down": "model.layers.*.mlp.{experts}down_proj",
    "layers.*.feedforward.shared.gate_up": "model.layers.*.mlp.shared_experts.{part}_proj",
    "layers.*.feedforward.shared.down": "model.layers.*.mlp.shared_experts.down_proj",
}
