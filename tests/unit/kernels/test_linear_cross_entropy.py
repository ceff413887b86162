"""The chunked head and loss against the plain formula in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.kernels import linear_cross_entropy as module
from treadle.kernels.linear_cross_entropy import linear_cross_entropy


def plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    z_loss: float,
    smoothing: float = 0.0,
) -> torch.Tensor:
    logits = x @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counts = targets != -100
    penalty = z_loss * logits.logsumexp(-1)[counts].square().sum()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) + penalty


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 50),
    chunk=st.integers(1, 50),
    softcap=st.sampled_from([None, 3.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_the_formula(
    tokens: int,
    vocabulary: int,
    chunk: int,
    softcap: float | None,
    z_loss: float,
    smoothing: float,
    ignored: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    results = []
    options: dict[str, Any] = {"softcap": softcap, "z_loss": z_loss, "smoothing": smoothing}
    for function in (
        lambda a, b: linear_cross_entropy(a, b, targets, chunk=chunk, **options)[0],
        lambda a, b: plain(a, b, targets, **options),
    ):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(a, b)
        (0.37 * loss).backward()
        results.append((loss.detach(), a.grad, b.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("x_grad", "weight_grad"), [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_gets_a_gradient(x_grad: bool, weight_grad: bool) -> None:
    x, weight = torch.randn(9, 4).requires_grad_(x_grad), torch.randn(7, 4).requires_grad_(weight_grad)
    loss, _ = linear_cross_entropy(x, weight, torch.randint(0, 7, (9,)))
    if x_grad or weight_grad:
        loss.backward()
    assert (x.grad is not None, weight.grad is not None) == (x_grad, weight_grad)


def test_bf16_computes_against_fp32_master_weights() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32), torch.randn(100, 32)
    targets = torch.randint(0, 100, (64,))
    narrow, master = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    linear_cross_entropy(narrow, master, targets, chunk=20)[0].backward()
    wide, exact = x.double().requires_grad_(), weight.double().requires_grad_()
    plain(wide, exact, targets, None, 0.0).backward()
    assert (master.grad.dtype, narrow.grad.dtype) == (torch.float32, torch.bfloat16)
    assert (master.grad - exact.grad).norm() / exact.grad.norm() < 1e-2
    assert (narrow.grad - wide.grad).norm() / wide.grad.norm() < 1e-2


def test_the_penalty_is_told_apart() -> None:
    x, weight, targets = torch.randn(9, 4), torch.randn(7, 4).requires_grad_(), torch.randint(0, 7, (9,))
    total, penalty = linear_cross_entropy(x, weight, targets, z_loss=0.1)
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, 0.1 * (x @ weight.T).logsumexp(-1).square().sum())
    torch.testing.assert_close(total - penalty, F.cross_entropy(x @ weight.T, targets, reduction="sum"))


def test_no_gradient_is_formed_where_none_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    monkeypatch.setattr(module, "add_outer_products", lambda *_: formed.append(1))
    with torch.no_grad():
        linear_cross_entropy(torch.randn(9, 4), torch.nn.Parameter(torch.randn(7, 4)), torch.randint(0, 7, (9,)))
    assert not formed
