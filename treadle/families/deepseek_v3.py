"""DeepSeek-V3 and R1 (arXiv:2412.19437, arXiv:2501.12948): V2 with another router, balanced by a bias."""

from collections.abc import Mapping
from typing import Any

from treadle.families.deepseek import ATTENTION, LAYER, MOE, SILENT, SIZES, TENSORS, DenseFirst, SharedExperts
from treadle.families.family import Family
from treadle.families.llama import MODEL
from treadle.families.rules import Activation, Document, Fixed, Key, Rule, Written, places


class Groups(Rule):
    """`n_group`, `topk_group`: experts of the groups whose best two add up to most; a single group is none."""

    names = ("n_group", "topk_group")

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        groups = {"count": config.get("n_group", 8), "keep": config.get("topk_group", 4), "score": "top2"}
        for router, key in places(document, f"{MOE}.router.groups"):
            router[key] = None if groups["count"] in (None, 1) else groups

    def write(self, document: Document, config: dict[str, Any]) -> None:
        for router, key in places(document, f"{MOE}.router.groups"):
            groups = router[key] or {"count": 1, "keep": 1}
            config["n_group"], config["topk_group"] = groups["count"], groups["keep"]


EXPERTS = {"kind": "moe", "router": {"kind": "sigmoid"}, "balance_bias": 0.001, "balance_loss": 0.0001}

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    model=MODEL,
    layer=LAYER,
    rules=(
        *SIZES,
        Key("max_position_embeddings", "max_length", default=4096),
        *ATTENTION,
        Key(
            "rope_interleave",
            "layers.*.mixer.position.layout",
            default=True,
            to=lambda interleaved: "interleaved" if interleaved else "half",
            back=lambda layout: layout == "interleaved",
        ),
        DenseFirst(EXPERTS, default=3),
        Key("intermediate_size", "layers.*.feedforward[gated].dim", default=18432),
        Key("n_routed_experts", f"{MOE}.experts", default=256, also=("num_local_experts",)),
        Key("num_experts_per_tok", f"{MOE}.top_k", default=8),
        Key("moe_intermediate_size", f"{MOE}.dim", default=2048),
        Key("routed_scaling_factor", f"{MOE}.router.scale", default=2.5),
        Key("norm_topk_prob", f"{MOE}.router.normalise", default=True),
        SharedExperts(default=1),
        Activation("hidden_act", "layers.*.feedforward.activation", f"{MOE}.shared.activation", default="silu"),
        Groups(),
        Fixed("scoring_func", "sigmoid"),
        Fixed("topk_method", "noaux_tc"),
        Fixed("moe_layer_freq", 1),
        SILENT,
        Written("num_nextn_predict_layers", 0),  # the head that predicts a token further ahead is left out
    ),
    tensors={**TENSORS, "layers.*.feedforward.router.balance_bias": "model.layers.*.mlp.gate.e_score_correction_bias"},
    optional=(r"model\.layers\.{depth}\..*",),  # the same head
)
