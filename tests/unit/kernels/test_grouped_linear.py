"""The grouped matmul against a matmul per group: values, gradients, empty groups, rows after the last group."""

import pytest
import torch
from torch import Tensor

from treadle.kernels.grouped_linear import grouped_linear, unsupported

SIZES = {
    "uneven": [3, 1, 9, 7],
    "empty groups": [0, 12, 0, 8],
    "one group": [0, 0, 20, 0],
}


def data(dtype: torch.dtype, seed: int = 0, inputs: int = 8, outputs: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(20, inputs, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(4, outputs, inputs, generator=g).to(dtype).requires_grad_()
    return x, weight, torch.randn(20, outputs, generator=g).to(dtype)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_grouped_equals_float64_matmuls(sizes: list[int], dtype: torch.dtype, tolerance: float) -> None:
    x, weight, grad = data(dtype)
    y = grouped_linear(x, weight, torch.tensor(sizes, dtype=torch.int32).cumsum(0).int(), implementation="grouped")
    y.backward(grad)
    wide, matrices = x.detach().double(), weight.detach().double()
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    torch.testing.assert_close(
        y.double(), torch.einsum("ni,noi->no", wide, matrices[group]), rtol=tolerance, atol=tolerance
    )
    dx = torch.einsum("no,noi->ni", grad.double(), matrices[group])
    dw = torch.zeros_like(matrices).index_add(0, group, torch.einsum("no,ni->noi", grad.double(), wide))
    for found, expected in ((x.grad, dx), (weight.grad, dw)):
        assert found is not None
        scale = expected.abs().max()
        torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sizes", [[3, 0, 4, 5], [0, 0, 0, 0]])
def test_rows_after_the_last_group_are_zero_and_get_no_gradient(sizes: list[int]) -> None:
    ends = torch.tensor(sizes).cumsum(0).int()
    used = sum(sizes)
    results = []
    for implementation in ("grouped", "loop"):
        x, weight, grad = data(torch.float32)
        y = grouped_linear(x, weight, ends, tail=True, implementation=implementation)  # type: ignore[arg-type]
        y.backward(grad)
        assert x.grad is not None
        assert y[used:].eq(0).all()
        assert x.grad[used:].eq(0).all()
        results.append((y.detach(), x.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_loop_takes_any_size_in_float64() -> None:
    x, weight, _ = data(torch.float64, inputs=7, outputs=5)
    ends = torch.tensor([2, 2, 11, 20], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends), (x, weight))


def test_what_does_not_fit_is_said() -> None:
    ends = torch.tensor([5, 10, 15, 20], dtype=torch.int32)
    x, weight, _ = data(torch.float32, inputs=6)
    assert unsupported(x, weight) == "a dimension of 6 torch.float32 numbers is no multiple of 16 bytes"
    with pytest.raises(ValueError, match="no multiple of 16 bytes; use implementation 'loop'"):
        grouped_linear(x, weight, ends, implementation="grouped")
    with pytest.raises(ValueError, match="float64"):
        grouped_linear(x.double(), weight.double(), ends, implementation="grouped")
    assert grouped_linear(x, weight, ends).shape == (20, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_the_compiler_needs(dtype: torch.dtype) -> None:
    ends = torch.tensor([5, 5, 15, 18], dtype=torch.int32)
    x, weight, _ = data(dtype)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.treadle.grouped_linear, (x, weight, ends, True), test_utils=tests)
    grouped_linear(x, weight, ends, tail=True, implementation="grouped").sum().backward()  # a gradient of one number


def test_pytorch_still_has_the_grouped_matmul() -> None:
    x, weight, _ = data(torch.float32)
    assert unsupported(x, weight) is None
