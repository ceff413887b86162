"""Mixture of experts: each token passes through the few feed-forwards that a router picks (arXiv:1701.06538).

Dropless: rows are sorted by expert and all experts are computed by one grouped matmul, whatever their load.

B batch, S sequence, T = B*S tokens, D model dim, E experts, K experts per token, N = T*K rows, F expert dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, autograd, nn

from treadle import kernels
from treadle.config.base import key_errors
from treadle.kernels.gates import GatedActivation, gated_activation
from treadle.kernels.grouped_linear import Implementation
from treadle.nn.config import FeedForwardConfig, RouterConfig
from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.router import Routing, SoftmaxRouterConfig


class MoEConfig(FeedForwardConfig):
    """Gated experts behind a router, with experts that every token visits beside them (DeepSeekMoE, 2401.06066)."""

    kind: Literal["moe"] = "moe"
    experts: PositiveInt = Field(description="how many experts there are")
    top_k: PositiveInt = Field(description="how many of them a token visits")
    dim: PositiveInt = Field(description="width of each expert's hidden layer")
    activation: GatedActivation = Field("silu", description="the experts' gate function")
    bias: bool = Field(False, description="bias on the experts' matrices")
    router: RouterConfig = Field(SoftmaxRouterConfig(), description="who goes where")
    shared: FeedForwardConfig | None = Field(None, description="a feed-forward that every token visits as well")
    shared_gate: bool = Field(False, description="a sigmoid gate on the shared one's output (Qwen2-MoE)")
    capacity: PositiveFloat | None = Field(
        None, description="rows an expert takes, as a multiple of an even share, others are dropped; null: all"
    )
    balance_loss: NonNegativeFloat = Field(0.01, description="weight of the load-balancing loss (Switch, Mixtral)")
    z_loss: NonNegativeFloat = Field(0.0, description="weight of the router's z-loss (ST-MoE, arXiv:2202.08906)")
    balance_bias: NonNegativeFloat | None = Field(
        None, description="step of the bias that balances without a loss (DeepSeek-V3: 0.001); null: no bias"
    )
    compute: Implementation = Field("auto", description="grouped: one matmul for all experts; loop: one for each")

    @model_validator(mode="after")
    def _experts_fit(self) -> "MoEConfig":
        if self.top_k > self.experts:
            raise key_errors([("top_k", f"{self.top_k} is more than experts={self.experts}")])
        if self.shared_gate and self.shared is None:
            raise key_errors([("shared_gate", "there is no shared feed-forward to gate; set `shared` or drop this")])
        problems = [(f"router.{key}", message) for key, message in self.router.problems(self.experts, self.top_k)]
        if problems:
            raise key_errors(problems)
        return self

    def problems(self, dim: int) -> Iterator[tuple[str, str]]:
        if self.shared is not None:
            yield from ((f"shared.{key}", message) for key, message in self.shared.problems(dim))
        if self.compute == "grouped" and dim % 8:
            yield "compute", f"grouped needs a model dim that is a multiple of 8, not {dim}; use loop"
        if self.compute == "grouped" and self.dim % 8:
            yield "dim", f"{self.dim} is no multiple of 8, which compute=grouped needs; round it, or use loop"


@dataclass(frozen=True)
class Observation:
    """What a mixture is asked to do for training, for the length of a step; see `treadle.train.routing`.

    scale: the gradient of the objective by this layer's losses, each a sum over tokens (fp32 scalar).
    record_R: fp32 leaf of size E + 3. Each backward adds to its gradient: rows per expert, then the sums over tokens
        of balance loss and z-loss (without their weights), then dropped rows.
    """

    scale: Tensor
    record_R: Tensor


class MoE(nn.Module):
    """Sum of the chosen experts' outputs by their weights, plus the shared one's.  x_BSD -> y_BSD"""

    roles = {"gate_up": "expert", "down": "expert", "shared_gate": "replicate"}
    scorers = ("shared_gate",)

    def __init__(self, config: MoEConfig, model_dim: int):
        super().__init__()
        self.experts, self.activation, self.capacity = config.experts, config.activation, config.capacity
        self.loss_weights = (config.balance_loss, config.z_loss)
        self.bias_rate = config.balance_bias
        self.router = config.router.build(
            model_dim, config.experts, config.top_k, biased=config.balance_bias is not None
        )
        common: dict[str, Any] = {"active": config.top_k, "bias": config.bias, "implementation": config.compute}
        self.gate_up = GroupedLinear(
            config.experts, model_dim, 2 * config.dim, alone="column", parts=("gate", "up"), **common
        )
        self.down = GroupedLinear(config.experts, config.dim, model_dim, alone="row", **common)
        self.shared = config.shared.build(model_dim) if config.shared else None
        self.shared_gate = Linear(model_dim, 1) if config.shared_gate else None
        self.observation: Observation | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD)
        y_TD, counts_E, dropped = self.mix(x_TD, routing)
        if self.observation is not None:
            losses_2 = self.losses(routing, counts_E)
            weights_2 = losses_2.new_tensor(self.loss_weights)
            record_R = torch.cat((counts_E.to(losses_2.dtype), losses_2.detach(), dropped.to(losses_2.dtype)[None]))
            objective = (losses_2 * weights_2).sum()
            y_TD = _Attach.apply(y_TD, objective, self.observation.scale, self.observation.record_R, record_R)
        return y_TD.view_as(x_BSD)

    def mix(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """The experts' outputs, added by weight, and the shared one's; the rows that chose each expert, dropped ones
        included; how many were dropped."""
        T, K = routing.experts_TK.shape
        capacity = None
        if self.capacity is not None:
            capacity = math.ceil(self.capacity * T * K / self.experts)
        order_N, inverse_N, counts_E, kept_E = sort_rows(routing.experts_TK, self.experts, capacity)
        sent = self.send(kernels.spread_rows(x_TD, order_N, inverse_N), kept_E)
        shared_TD = self.shared_output(x_TD)  # here, because rows may be on their way to other processes meanwhile
        y_TD = kernels.combine_rows(self.receive(sent), routing.weights_TK, order_N, inverse_N)
        return y_TD if shared_TD is None else y_TD + shared_TD, counts_E, (counts_E - kept_E).sum()

    def send(self, rows_ND: Tensor, kept_E: Tensor) -> Any:
        """Give each expert its rows, so many of those sorted by expert; `receive` goes on from what this returns.

        All experts are here, and nothing travels. Expert parallelism puts another pair in the place of these two.
        """
        return rows_ND, kept_E

    def receive(self, sent: Any) -> Tensor:
        """What the experts make of the rows that were sent, in the same order; zeros after the last.  -> out_ND"""
        return self.compute(*sent, tail=self.capacity is not None)

    def compute(self, rows_ND: Tensor, rows_E: Tensor, *, tail: bool) -> Tensor:
        """The experts' outputs for rows that are sorted by expert, `rows_E` for each; tail: more rows follow."""
        ends_E = rows_E.cumsum(0).to(torch.int32)
        hidden_NF = gated_activation(self.gate_up(rows_ND, ends_E, tail=tail), self.activation)
        return self.down(hidden_NF, ends_E, tail=tail)  # type: ignore[no-any-return]

    def shared_output(self, x_TD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        shared_TD: Tensor = self.shared(x_TD)
        return shared_TD if self.shared_gate is None else shared_TD * self.shared_gate(x_TD).sigmoid()

    def losses(self, routing: Routing, counts_E: Tensor) -> Tensor:
        """Sums over tokens of the balance loss and the z-loss.  -> losses_2

        Balance: E * sum_e f_e P_e, with f_e the rows of expert e per token, and P_e the mean of its probability
        (arXiv:2101.03961, eq. 4; as in Mixtral, not divided by K): K when the load is even, E when it is on K experts.
        """
        T, E = routing.logits_TE.shape
        balance = E * (counts_E.to(routing.logits_TE.dtype) * routing.probabilities_TE.sum(0)).sum() / T
        return torch.stack((balance, routing.logits_TE.logsumexp(-1).square().sum()))


def sort_rows(experts_TK: Tensor, experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in the order of their experts: order_N, its inverse, rows that chose each expert, rows each computes.

    Row k*T + t is the k-th choice of token t. An expert takes `capacity` rows, first choices before second ones
    (GShard, arXiv:2006.16668), earlier tokens before later; the others come last in the order.
    """
    sorted_N, order_N = experts_TK.t().flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_N, torch.arange(experts, device=sorted_N.device), right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    kept_E = counts_E
    if capacity is not None:
        kept_E = counts_E.clamp(max=capacity)
        place_N = torch.arange(sorted_N.numel(), device=sorted_N.device) - (ends_E - counts_E)[sorted_N]
        order_N = order_N[torch.where(place_N < capacity, sorted_N, experts).argsort(stable=True)]
    inverse_N = torch.empty_like(order_N).scatter(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    return order_N, inverse_N, counts_E, kept_E


class _Attach(autograd.Function):
    """y itself. In the backward the objective gets the gradient `scale`, and the leaf gets the record as gradient.

    So a layer's own losses need no way to the end of the model (nor to the last pipeline stage), and because a
    forward that is only recomputed has one backward, nothing is counted twice.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, objective: Tensor, scale: Tensor, leaf_R: Tensor, record_R: Tensor) -> Tensor:
        ctx.save_for_backward(scale, record_R)
        ctx.dtypes = objective.dtype, leaf_R.dtype
        # No view: where a compiled graph begins with y (after a break), a view of its input would lose this backward.
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scale, record_R = ctx.saved_tensors
        objective, leaf = ctx.dtypes
        return grads[0], scale.to(objective), None, record_R.to(leaf), None
