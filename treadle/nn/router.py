"""Routers: which experts a token goes to, and with what weight.

T tokens, D model dim, E experts, K chosen experts, G groups of experts.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from treadle.config import Config
from treadle.nn.config import RouterConfig
from treadle.nn.linear import Linear


class GroupsConfig(Config):
    """A token's experts are chosen from its best groups only, so that it visits few devices (DeepSeek-V2, V3)."""

    count: PositiveInt = Field(description="groups that the experts are divided into, in order")
    keep: PositiveInt = Field(description="groups that a token may choose from")
    score: Literal["max", "top2"] = Field(
        "top2", description="what ranks a group: its best expert (DeepSeek-V2), or its best two added (V3)"
    )


class TopKRouterConfig(RouterConfig):
    """What both routers share."""

    normalise: bool = Field(True, description="divide the chosen weights by their sum")
    bias: bool = Field(False, description="bias on the logits (GPT-OSS)")
    scale: PositiveFloat = Field(1.0, description="factor on the chosen weights (DeepSeek's routed scaling factor)")
    groups: GroupsConfig | None = Field(None, description="choose from the best groups of experts; null: from all")

    def problems(self, experts: int, top_k: int) -> Iterator[tuple[str, str]]:
        groups = self.groups
        if groups is None:
            return
        if experts % groups.count:
            yield "groups.count", f"{groups.count} does not divide experts={experts}"
        elif groups.keep > groups.count:
            yield "groups.keep", f"{groups.keep} is more than the count={groups.count} of groups"
        elif groups.keep * (experts // groups.count) < top_k:
            yield "groups.keep", f"{groups.keep} groups of {experts // groups.count} hold less than top_k={top_k}"
        elif groups.score == "top2" and experts // groups.count < 2:
            yield "groups.score", "top2 needs groups of at least two experts; use max"


class SoftmaxRouterConfig(TopKRouterConfig):
    """Softmax over all experts, then the top k (Mixtral, Qwen3-MoE; normalise: false is Qwen2-MoE, Switch)."""

    kind: Literal["softmax"] = "softmax"

    def problems(self, experts: int, top_k: int) -> Iterator[tuple[str, str]]:
        yield from super().problems(experts, top_k)
        if self.normalise and top_k == 1:
            yield "normalise", "with top_k=1 the weight would always be 1, and the router learns nothing; set it false"


class SigmoidRouterConfig(TopKRouterConfig):
    """A sigmoid for each expert, then the top k (DeepSeek-V3, arXiv:2412.19437)."""

    kind: Literal["sigmoid"] = "sigmoid"


class Routing(NamedTuple):
    """experts_TK: int64, weights_TK: both by falling score. probabilities_TE: sum to one. logits_TE. All in fp32."""

    experts_TK: Tensor
    weights_TK: Tensor
    probabilities_TE: Tensor
    logits_TE: Tensor


class TopKRouter(nn.Module):
    """Scores in float32, a choice of k, weights.  x_TD -> Routing

    With `biased`, a bias on the scores takes part in the choice and not in the weights. It gets no gradient: it is
    moved against the load after each step (arXiv:2408.15664, see `treadle.train.routing`).
    """

    roles = {"gate": "replicate", "balance_bias": "replicate"}
    scorers = ("gate",)
    full_precision = True
    float32 = ("balance_bias",)

    def __init__(self, config: TopKRouterConfig, dim: int, experts: int, top_k: int, *, biased: bool):
        super().__init__()
        self.top_k, self.normalise, self.scale, self.groups = top_k, config.normalise, config.scale, config.groups
        self.gate = Linear(dim, experts, bias=config.bias)
        self.balance_bias = nn.Parameter(torch.zeros(experts), requires_grad=False) if biased else None

    def scores(self, logits_TE: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = self.gate(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)))
        scores_TE = self.scores(logits_TE)
        ranks_TE = scores_TE.detach() if self.balance_bias is None else scores_TE.detach() + self.balance_bias
        if self.groups is not None:
            ranks_TE = ranks_TE.masked_fill(~in_best_groups(ranks_TE, self.groups), float("-inf"))
        experts_TK = ranks_TE.topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        probabilities_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts_TK, weights_TK * self.scale, probabilities_TE, logits_TE)


class SoftmaxRouter(TopKRouter):
    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1)


class SigmoidRouter(TopKRouter):
    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()


def in_best_groups(ranks_TE: Tensor, groups: GroupsConfig) -> Tensor:
    """Which experts are in the groups that a token keeps.  -> mask_TE"""
    ranks_TGM = ranks_TE.unflatten(-1, (groups.count, -1))
    best = 1 if groups.score == "max" else 2
    best_TG = ranks_TGM.topk(best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool)
    kept_TG = kept_TG.scatter(-1, best_TG.topk(groups.keep, dim=-1).indices, True)
    return kept_TG[..., None].expand_as(ranks_TGM).flatten(-2)
