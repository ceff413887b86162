"""Layouts: whatever the shape, each number of ours has one place there, and each number there one of ours."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle.families.layouts import (
    ByBlock,
    HeadByHead,
    InterleavedExperts,
    Layout,
    Plain,
    QueryKeyValue,
    Transposed,
    Whole,
)
from treadle.nn.linear import GroupedLinear, Linear


def sources(layout: Layout, parameter: Tensor, module: nn.Module, block: Any = None) -> dict[str, Tensor]:
    """What is there when every number of the parameter is 1 + its index; checks that it goes there and back."""
    parameter = torch.arange(1, parameter.numel() + 1).view(parameter.shape)
    there: dict[str, Tensor] = {}
    back = torch.zeros_like(parameter)
    for piece in layout.pieces(layout.name, parameter, module, block):
        source = there.setdefault(piece.source, torch.zeros(piece.shape, dtype=torch.int64))
        assert source.shape == piece.shape, piece.source
        select = piece.select(source)
        assert (select == 0).all(), f"{piece.source} is written twice"
        select.copy_(piece.place(parameter))
    for piece in layout.pieces(layout.name, back, module, block):
        place = piece.place(back)
        assert (place == 0).all(), "ours is written twice"
        place.copy_(piece.select(there[piece.source]))
    assert torch.equal(back, parameter)
    numbers = torch.cat([tensor.flatten() for tensor in there.values()])
    assert torch.equal(numbers.sort().values, parameter.flatten())
    return there


LINEAR = [
    Linear(inputs, sum(parts.values()), bias=True, parts=parts)
    for inputs, parts in [(3, {"q": 8, "k": 4, "v": 4}), (5, {"q": 6, "k": 2, "v": 2}), (1, {"q": 2, "k": 2, "v": 2})]
]


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_plain(linear: Linear, leaf: str) -> None:
    parameter = getattr(linear, leaf)
    assert list(sources(Plain("x"), parameter, linear)) == ["x"]
    parted = sources(Plain("x.{part}_proj", v="value"), parameter, linear)
    assert {name: tensor.shape[0] for name, tensor in parted.items()} == {
        "x.q_proj": linear.parts["q"],
        "x.k_proj": linear.parts["k"],
        "x.value_proj": linear.parts["v"],
    }
    swapped = sources(Plain("{part}", k="v", v="k"), parameter, linear)
    assert torch.equal(swapped["v"], parted["x.k_proj"])
    merged = sources(Plain("{part}", k="kv", v="kv"), parameter, linear)
    assert {name: tensor.shape[0] for name, tensor in merged.items()} == {
        "q": linear.parts["q"],
        "kv": 2 * linear.parts["k"],
    }


@pytest.mark.parametrize(("experts", "inputs", "outputs"), [(1, 2, 4), (3, 5, 6), (4, 1, 2)])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_experts(experts: int, inputs: int, outputs: int, leaf: str) -> None:
    grouped = GroupedLinear(experts, inputs, outputs, active=1, alone="column", bias=True, parts=("gate", "up"))
    parameter = getattr(grouped, leaf)
    each = sources(Plain("e.{expert}.{part}"), parameter, grouped)
    assert list(each) == [f"e.{expert}.{part}" for expert in range(experts) for part in ("gate", "up")]
    (one,) = sources(Whole("e"), parameter, grouped).values()
    assert one.shape == parameter.shape
    (turns,) = sources(InterleavedExperts("e"), parameter, grouped).values()
    for expert in range(experts):
        for output in range(outputs // 2):
            assert torch.equal(turns[expert, ..., 2 * output], each[f"e.{expert}.gate"][output])
            assert torch.equal(turns[expert, ..., 2 * output + 1], each[f"e.{expert}.up"][output])
    if leaf == "weight":
        (transposed,) = sources(Transposed("e"), parameter, grouped).values()
        assert torch.equal(transposed, one.transpose(1, 2))


@pytest.mark.parametrize("linear", LINEAR)
def test_transposed(linear: Linear) -> None:
    (matrix,) = sources(Transposed("x"), linear.weight, linear).values()
    assert matrix.shape == (linear.weight.shape[1], linear.weight.shape[0])
    assert list(sources(Transposed("x"), linear.bias, linear)) == ["x"]


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_query_key_value(linear: Linear, leaf: str) -> None:
    parameter = getattr(linear, leaf)
    head_dim = 2
    (fused,) = sources(QueryKeyValue("x"), parameter, linear, SimpleNamespace(head_dim=head_dim)).values()
    ours = torch.arange(1, parameter.numel() + 1).view(parameter.shape).split(list(linear.parts.values()))
    queries, keys, values = (rows.unflatten(0, (-1, head_dim)) for rows in ours)
    groups = linear.parts["k"] // head_dim
    per_group = len(queries) // groups
    rows = []
    for group in range(groups):
        rows += [*queries[group * per_group : (group + 1) * per_group], keys[group], values[group]]
    assert torch.equal(fused, torch.cat(rows))


@pytest.mark.parametrize(("heads", "key", "value"), [(1, 2, 3), (4, 3, 1), (2, 2, 2)])
def test_head_by_head(heads: int, key: int, value: int) -> None:
    linear = Linear(3, heads * (key + value), parts={"k": heads * key, "v": heads * value})
    (mixed,) = sources(HeadByHead("x"), linear.weight, linear, SimpleNamespace(heads=heads)).values()
    ours = torch.arange(1, linear.weight.numel() + 1).view(linear.weight.shape)
    keys, values = ours[: heads * key].view(heads, key, 3), ours[heads * key :].view(heads, value, 3)
    for head in range(heads):
        rows = mixed[head * (key + value) : (head + 1) * (key + value)]
        assert torch.equal(rows, torch.cat((keys[head], values[head])))


def test_a_name_that_depends_on_the_block() -> None:
    linear = Linear(2, 2)
    layout = ByBlock("x.{which}", lambda block: "one" if isinstance(block, nn.Linear) else "other")
    assert list(sources(layout, linear.weight, linear, nn.Linear(1, 1))) == ["x.one"]
    assert list(sources(layout, linear.weight, linear, nn.Identity())) == ["x.other"]
