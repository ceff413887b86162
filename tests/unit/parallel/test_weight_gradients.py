"""Weight gradients that wait are those of an ordinary backward, each formed once and only when it is called for."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from treadle.nn.linear import GroupedLinear, Linear
from treadle.parallel.weight_gradients import DeferringLinear, defer_weight_gradients


def filled(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


class Layers(nn.Module):
    def __init__(self, implementation="auto"):
        super().__init__()
        self.first = Linear(8, 16, bias=True)
        common = {"active": 1, "alone": "column", "bias": True, "implementation": implementation}
        self.experts = GroupedLinear(3, 16, 8, **common)

    def forward(self, x):
        rows = torch.tanh(self.first(x)).flatten(0, 1)
        ends = torch.tensor([2, 2, rows.shape[0] - 1], dtype=torch.int32)  # one expert is idle, one row left over
        return self.experts(rows, ends, tail=True).square().sum()


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_a_backward(implementation, recompute):
    plain = filled(Layers(implementation))
    deferring = copy.deepcopy(plain)
    queue = defer_weight_gradients([deferring])
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for _ in range(2):
        plain(x).backward()
        (checkpoint(deferring, y, use_reentrant=False) if recompute else deferring(y)).backward()
    assert torch.allclose(y.grad, x.grad, atol=1e-5)
    assert deferring.first.weight.grad is None
    assert deferring.experts.weight.grad is None
    assert len(queue.waiting) == 4
    run = queue.take()
    assert not queue.waiting
    run()
    run()  # nothing is left of it
    for name, parameter in plain.named_parameters():
        found = deferring.get_parameter(name).grad
        assert torch.allclose(found, parameter.grad, rtol=1e-5, atol=1e-4), name


def test_layers_stay_what_they_were():
    model = filled(Layers())
    names = [name for name, _ in model.named_parameters()]
    defer_weight_gradients([model])
    assert type(model.first) is DeferringLinear
    assert isinstance(model.first, Linear)
    assert isinstance(model.experts, GroupedLinear)
    assert [name for name, _ in model.named_parameters()] == names


def test_narrow_weights_add_up_in_float32():
    """As FSDP gathers them: 300 equal gradients of a bf16 weight, which bf16 would stop adding up at 256."""
    layer = Linear(1, 1)
    nn.init.ones_(layer.weight)
    layer.to(torch.bfloat16)
    queue = defer_weight_gradients([layer])
    for _ in range(300):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        queue.take()()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.item() == 300.0


def test_a_forward_without_gradients_leaves_nothing():
    layer = filled(Linear(4, 4))
    queue = defer_weight_gradients([layer])
    with torch.no_grad():
        layer(torch.ones(1, 4))
    layer(torch.ones(1, 4)).sum()  # nor one whose backward never comes
    layer.weight.requires_grad_(False)
    x = torch.ones(1, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert not queue.waiting
