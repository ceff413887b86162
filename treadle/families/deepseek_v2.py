"""DeepSeek-V2 (arXiv:2405.04434)."""

from collections.abc import Mapping
from typing import Any

from treadle.errors import ConfigError
from treadle.families.deepseek import ATTENTION, LAYER, MOE, SILENT, SIZES, TENSORS, DenseFirst, SharedExperts
from treadle.families.family import Family
from treadle.families.llama import MODEL
from treadle.families.rules import Activation, Document, Fixed, Key, Rule, places


class BestGroups(Rule):
    """`topk_method`: the best experts of all, or of the groups that have the best expert."""

    names = ("topk_method", "n_group", "topk_group")

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        method = config.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(f"config.json: topk_method: '{method}'; known: greedy, group_limited_greedy")
        groups = {"count": config.get("n_group"), "keep": config.get("topk_group"), "score": "max"}
        for router, key in places(document, f"{MOE}.router.groups"):
            router[key] = None if method == "greedy" else groups

    def write(self, document: Document, config: dict[str, Any]) -> None:
        for router, key in places(document, f"{MOE}.router.groups"):
            groups = router[key] or {"count": None, "keep": None}
            config["topk_method"] = "group_limited_greedy" if router[key] else "greedy"
            config["n_group"], config["topk_group"] = groups["count"], groups["keep"]


EXPERTS = {"kind": "moe", "router": {"kind": "softmax", "normalise": False}}

FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(
        *SIZES,
        Key("max_position_embeddings", "max_length", default=2048),
        *ATTENTION,
        DenseFirst(EXPERTS, default=0),
        Key("intermediate_size", "layers.*.feedforward[gated].dim", default=11008),
        Key("n_routed_experts", f"{MOE}.experts", default=64),
        Key("num_experts_per_tok", f"{MOE}.top_k", default=None),
        Key("moe_intermediate_size", f"{MOE}.dim", default=1407),
        Key("routed_scaling_factor", f"{MOE}.router.scale", default=1.0),
        SharedExperts(default=2),
        Activation("hidden_act", "layers.*.feedforward.activation", f"{MOE}.shared.activation", default="silu"),
        BestGroups(),
        Fixed("scoring_func", "softmax"),
        Fixed("norm_topk_prob", False),  # DeepSeek's code heeds it, that of transformers does not
        Fixed("mlp_bias", False),
        Fixed("moe_layer_freq", 1),
        SILENT,
    ),
    tensors=TENSORS,
)
