"""Mixtures of experts: the formula token by token, capacity, empty experts, initialisation, counts, errors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle.config import Config, resolve
from treadle.errors import ConfigError
from treadle.nn import flops
from treadle.nn.config import FeedForwardConfig
from treadle.nn.init import fill_normal
from treadle.nn.moe import MoE, sort_rows
from treadle.nn.roles import parameter_roles
from treadle.nn.transformer import TransformerConfig

D, F, E = 8, 16, 4


class Part(Config):
    feedforward: FeedForwardConfig


def build(**options: Any) -> MoE:
    spec = {"kind": "moe", "experts": E, "top_k": 2, "dim": F, **options}
    block: MoE = resolve(Part, {"feedforward": spec}).feedforward.build(D)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def expert(block: MoE, e: int, x: Tensor) -> Tensor:
    gate, up = (x @ block.gate_up.weight[e].T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ block.down.weight[e].T


def by_hand(block: MoE, x_TD: Tensor, capacity: int | None = None) -> Tensor:
    """Token by token, choice by choice; first choices are served before second ones."""
    probabilities = (x_TD @ block.router.gate.weight.T).softmax(-1)
    weights, experts = probabilities.topk(2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    out, taken = [torch.zeros(D, dtype=x_TD.dtype) for _ in x_TD], [0] * E
    for k in range(2):
        for t, x in enumerate(x_TD):
            e = int(experts[t, k])
            taken[e] += 1
            if capacity is None or taken[e] <= capacity:
                out[t] = out[t] + weights[t, k] * expert(block, e, x)
    return torch.stack(out)


@pytest.mark.parametrize("capacity", [None, 1.0, 0.5])
def test_loop_is_the_formula_in_float64(capacity: float | None) -> None:
    torch.manual_seed(1)
    block = build(compute="loop", capacity=capacity).double()
    x = torch.randn(1, 13, D, dtype=torch.float64, requires_grad=True)
    rows = None if capacity is None else math.ceil(capacity * 13 * 2 / E)
    found, expected = block(x), by_hand(block, x[0], rows)[None]
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    inputs = [x, *block.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), inputs), wanted)


@pytest.mark.parametrize("capacity", [None, 1.0, 0.25])
@pytest.mark.parametrize("skew", [0.0, 100.0])
def test_grouped_equals_loop_also_with_empty_experts(capacity: float | None, skew: float) -> None:
    torch.manual_seed(2)
    loop, grouped = build(compute="loop", capacity=capacity), build(compute="grouped", capacity=capacity)
    grouped.load_state_dict(loop.state_dict())
    x = torch.randn(2, 11, D)
    if skew:  # the first two experts take all
        x[..., 0] = 1.0
        for block in (loop, grouped):
            with torch.no_grad():
                block.router.gate.weight[:, 0] = torch.tensor([skew, skew, 0, 0])
    results = []
    for block in (loop, grouped):
        x_in = x.clone().requires_grad_()
        y = block(x_in)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), x_in.grad, [p.grad for p in block.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    if skew:
        assert loop.gate_up.weight.grad is not None
        assert loop.gate_up.weight.grad[2:].eq(0).all()
    _, counts, dropped = loop.mix(x.flatten(0, 1), loop.router(x.flatten(0, 1)))
    assert counts.sum() == 44
    limit = 44 if capacity is None else math.ceil(capacity * 11)
    assert dropped == (counts - limit).clamp(min=0).sum()


def test_rows_are_sorted_and_found_again() -> None:
    experts_TK = torch.tensor([[2, 0], [2, 1], [2, 0], [0, 2]])
    order, inverse, counts, kept = sort_rows(experts_TK, 4, None)
    assert counts.tolist() == kept.tolist() == [3, 1, 4, 0]
    assert experts_TK.t().flatten()[order].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert order[inverse].tolist() == list(range(8))
    order, _, counts, kept = sort_rows(experts_TK, 4, 2)
    assert (counts.tolist(), kept.tolist()) == ([3, 1, 4, 0], [2, 1, 2, 0])
    # Token 3's first choice of expert 0 goes before token 0's second; the third and fourth wish for expert 2 are late.
    assert order.tolist() == [3, 4, 5, 0, 1, 6, 2, 7]


def test_bias_moves_the_choice_but_not_the_weight() -> None:
    block = build(router={"kind": "sigmoid", "normalise": False}, balance_bias=0.001)
    nn.init.zeros_(block.router.balance_bias)
    x = torch.randn(6, D)
    block.router.balance_bias.data[3] = 10.0
    routing = block.router(x)
    assert routing.experts_TK[:, 0].eq(3).all()
    logits = x @ block.router.gate.weight.T
    torch.testing.assert_close(routing.weights_TK, logits.sigmoid().gather(1, routing.experts_TK))


def test_groups_bound_where_a_token_goes() -> None:
    router = {"kind": "sigmoid", "groups": {"count": 4, "keep": 2}}
    block = build(experts=16, top_k=4, router=router)
    experts_TK = block.router(torch.randn(50, D)).experts_TK
    assert all(len(set((row // 4).tolist())) <= 2 for row in experts_TK)
    assert len(set((experts_TK // 4).flatten().tolist())) == 4


def test_router_computes_in_float32() -> None:
    block = build()
    routing = block.router(torch.randn(5, D, dtype=torch.bfloat16))
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert block(torch.randn(1, 5, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


def spec(**options: Any) -> dict[str, Any]:
    moe = {"kind": "moe", "experts": E, "top_k": 2, "dim": F, **options}
    layer = {"kind": "pre_norm", "repeat": 2, "mixer": {"kind": "attention", "heads": 2}, "feedforward": moe}
    return {"dim": D, "vocab_size": 32, "max_length": 32, "layers": [layer]}


def test_every_expert_starts_as_if_alone() -> None:
    model = resolve(TransformerConfig, spec(balance_bias=0.001)).build().initialise(3)
    block = model.layers["1"].feedforward
    up, down = torch.empty(F, D), torch.empty(D, F)
    fill_normal(up, 0.02, seed=3, name="layers.1.feedforward.gate_up.2.up.weight")
    fill_normal(down, 0.02 / math.sqrt(2 * 2), seed=3, name="layers.1.feedforward.down.2.weight")
    assert torch.equal(block.gate_up.weight[2, F:], up)
    assert torch.equal(block.down.weight[2], down)
    assert block.router.balance_bias.eq(0).all()


def test_roles_and_counts_by_hand() -> None:
    shared = {"kind": "gated", "dim": 24}
    model = resolve(TransformerConfig, spec(shared=shared, shared_gate=True)).build()
    roles = parameter_roles(model)
    name = "layers.0.feedforward"
    assert roles[f"{name}.gate_up.weight"] == roles[f"{name}.down.weight"] == "expert"
    assert roles[f"{name}.router.gate.weight"] == roles[f"{name}.shared_gate.weight"] == "replicate"
    assert roles[f"{name}.shared.down.weight"] == "row"
    one, fixed = 3 * D * F, D * E + 3 * D * 24 + D
    block = model.layers["0"].feedforward
    assert flops.parameter_count(block) == 4 * one + fixed
    assert flops.active_parameter_count(block) == 2 * one + fixed
    assert flops.forward_flops(block, 32) == 2 * (2 * one + fixed)


def test_biases_of_idle_experts_are_not_active() -> None:
    """GPT-OSS: of each expert as many biases as outputs; the router's bias is met by every token."""
    model = resolve(TransformerConfig, spec(bias=True, router={"kind": "softmax", "bias": True})).build()
    block = model.layers["0"].feedforward
    one, fixed = 3 * D * F + 2 * F + D, D * E + E
    assert flops.parameter_count(block) == 4 * one + fixed
    assert flops.active_parameter_count(block) == 2 * one + fixed
    assert flops.forward_flops(block, 32) == 2 * (2 * 3 * D * F + D * E)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, r"feedforward.top_k: 5 is more than experts=4"),
        ({"top_k": 1}, r"feedforward.router.normalise: with top_k=1"),
        ({"shared_gate": True}, r"feedforward.shared_gate: there is no shared"),
        ({"router": {"kind": "sigmoid", "groups": {"count": 3, "keep": 1}}}, r"router.groups.count: 3 does not divide"),
        ({"router": {"kind": "sigmoid", "groups": {"count": 2, "keep": 3}}}, r"router.groups.keep: 3 is more"),
        ({"router": {"kind": "softmax", "groups": {"count": 4, "keep": 1}}}, r"router.groups.keep: 1 groups of 1 hold"),
        ({"router": {"kind": "softmax", "groups": {"count": 4, "keep": 2}}}, r"router.groups.score: top2 needs"),
        ({"router": "softmx"}, r"router.*Did you mean 'softmax'"),
        ({"compute": "grouped", "dim": 12}, r"feedforward.dim: 12 is no multiple of 8"),
    ],
)
def test_impossible_mixtures_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(TransformerConfig, spec(**change))
