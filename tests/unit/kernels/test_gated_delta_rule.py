"""The gated delta rule: by chunks against the definition in float64, documents, states, and what could overflow."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.kernels.gated_delta_rule import chunked, gated_delta_rule, recurrent
from treadle.kernels.gated_delta_scan import gated_delta_scan

B, H, R, K, V = 2, 2, 3, 8, 5


def data(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """q, k, v, log decay, beta, and the state before; decays from next to nothing to all."""
    g = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(B, length, H, K, generator=g, dtype=torch.float64), dim=-1) for _ in "qk")
    v = torch.randn(B, length, H * R, V, generator=g, dtype=torch.float64)
    log_decay = -30 * torch.rand(B, length, H * R, generator=g, dtype=torch.float64) ** 6
    beta = torch.rand(B, length, H * R, generator=g, dtype=torch.float64)
    state = torch.randn(B, H * R, K, V, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, log_decay, beta, state)]


def run(form: Any, tensors: list[Tensor], starts: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    *inputs, state = tensors
    starts = torch.zeros(inputs[0].shape[:2], dtype=torch.bool) if starts is None else starts
    return form(*inputs, starts, state, **options)


def by_matrices(tensors: list[Tensor], b: int, g: int) -> tuple[Tensor, Tensor]:
    """The paper's equation for one head, as products of matrices: S = a (I - beta k k^T) S + beta k v^T."""
    q, k, v, log_decay, beta, state = tensors
    S, read = state[b, g], []
    for t in range(q.shape[1]):
        key = k[b, t, g // R][:, None]
        S = log_decay[b, t, g].exp() * (torch.eye(K, dtype=S.dtype) - beta[b, t, g] * key @ key.T) @ S
        S = S + beta[b, t, g] * key @ v[b, t, g][None]
        read.append(q[b, t, g // R] @ S)
    return torch.stack(read), S


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_both_forms_are_the_papers_equation(form: Any) -> None:
    tensors = data(70)
    y, state = run(form, tensors)
    for b in range(B):
        for g in range(H * R):
            wanted, last = by_matrices(tensors, b, g)
            torch.testing.assert_close(y[b, :, g], wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(state[b, g], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_chunks_are_the_loop(length: int, dtype: torch.dtype, tolerance: float) -> None:
    starts = torch.rand(B, length, generator=torch.Generator().manual_seed(length)) < 0.05
    expected = run(recurrent, data(length), starts)
    for form in (chunked, gated_delta_rule):
        for found, wanted in zip(run(form, data(length, dtype), starts), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [5, 64, 100])
def test_gradients_of_chunks_are_the_loops(length: int) -> None:
    starts = torch.zeros(B, length, dtype=torch.bool)
    starts[0, length // 2] = starts[1, length - 1] = True
    gradients = []
    for form in (recurrent, chunked):
        tensors = [x.requires_grad_() for x in data(length)]
        y, state = run(form, tensors, starts)
        weight = torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)
        gradients.append(torch.autograd.grad((y * weight).sum() + state.square().sum(), tensors))
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_gradients_are_finite_differences() -> None:
    tensors = [x[:1].contiguous().requires_grad_() for x in data(5)]
    starts = torch.tensor([[False, False, False, True, False]])
    assert torch.autograd.gradcheck(
        lambda *inputs: run(chunked, list(inputs), starts, chunk=4), tensors, fast_mode=True
    )


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), chunk=st.sampled_from([4, 16, 64]))
def test_documents_are_computed_as_if_alone(lengths: list[int], chunk: int) -> None:
    """The first document goes on from the given state, the others from nothing; in float32."""
    total = sum(lengths)
    tensors = data(total, torch.float32, seed=total)
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    starts = torch.zeros(B, total, dtype=torch.bool)
    starts[:, begins[1:]] = True
    y, state = run(chunked, tensors, starts, chunk=chunk)
    *inputs, before = tensors
    for begin, length in zip(begins, lengths, strict=True):
        alone = [x[:, begin : begin + length] for x in inputs]
        wanted, last = run(recurrent, [*alone, before if begin == 0 else torch.zeros_like(before)])
        torch.testing.assert_close(y[:, begin : begin + length], wanted, rtol=0, atol=3e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=3e-6)


@pytest.mark.parametrize("cut", [1, 10, 64, 99])
def test_a_row_in_pieces(cut: int) -> None:
    tensors = data(100)
    *inputs, state = tensors
    whole, last = run(chunked, tensors)
    first, between = run(gated_delta_rule, [*(x[:, :cut] for x in inputs), state])
    second, end = run(gated_delta_rule, [*(x[:, cut:] for x in inputs), between])
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -1.0, -700.0, -math.inf])
def test_repeated_keys_and_any_decay_stay_exact(log_decay: float) -> None:
    """Equal keys written at full strength: each token leaves its own value, whatever the chunk's system looks like."""
    _, k, v, _, _, state = data(130, torch.float32)
    k = k[:, :1].expand_as(k)
    decays, ones = torch.full(v.shape[:3], log_decay), torch.ones(v.shape[:3])
    tensors = [k, k, v, decays, ones, state]
    tensors = [x.clone().requires_grad_() for x in tensors]
    y, last = run(chunked, tensors)
    torch.testing.assert_close(y, v, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(y.square().sum() + last.sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_what_follows_a_strong_decay_keeps_its_digits() -> None:
    """A sum of logarithms from the chunk's start would be 5000 here, with nothing left of the next ones' decimals."""
    exact = data(64)
    exact[3] = torch.full_like(exact[3], -0.01)
    exact[3][:, 1] = -5000
    rounded = [x.float() for x in exact]
    wanted, _ = run(recurrent, exact)
    found, _ = run(chunked, rounded)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


def test_the_scan_is_a_lawful_operator() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 5), (2, 3, 4, 6), (2, 3, 6, 4), (2, 3, 1, 1), (2, 6, 5)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.library.opcheck(torch.ops.treadle.gated_delta_scan.default, tensors)
    assert torch.autograd.gradcheck(gated_delta_scan, tensors)


def test_bad_arguments_are_refused() -> None:
    tensors = data(4)
    with pytest.raises(ValueError, match="2 key heads do not divide 5 value heads"):
        run(gated_delta_rule, [*tensors[:2], *(x[:, :, :5] for x in tensors[2:5]), tensors[5][:, :5]])
    with pytest.raises(ValueError, match=r"the state would be kept in torch.bfloat16; cast"):
        run(gated_delta_rule, data(4, torch.bfloat16))
