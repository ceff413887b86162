"""What two operations are defined to compute, against formulas in float64: causal attention, and a linear map with its
epilogue."""

import math

import pytest
import torch

from treadle import kernels
from treadle.kernels.fused_linear import ALL


def test_causal_attention_one_query_at_a_time() -> None:
    """Out, log of the sum, and all gradients, by the derivative of a softmax written out."""
    torch.manual_seed(0)
    B, S, H, G, K, scale = 2, 7, 4, 2, 8, 0.4
    q, k, v, dout = (torch.randn(B, S, heads, K, dtype=torch.float64) for heads in (H, G, G, H))
    out, log_sum = torch.ops.treadle.causal_attention(q, k, v, scale)
    found = torch.ops.treadle.causal_attention_backward(dout, q, k, v, out, log_sum, scale)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for s in range(S):
                keys, values = k[b, : s + 1, g], v[b, : s + 1, g]
                powers = [math.exp(scale * float(q[b, s, h] @ key)) for key in keys]
                weights = torch.tensor(powers, dtype=torch.float64) / sum(powers)
                torch.testing.assert_close(out[b, s, h], weights @ values)
                assert math.isclose(float(log_sum[b, h, s]), math.log(sum(powers)), abs_tol=1e-9)
                dweights = values @ dout[b, s, h]
                dscores = weights * (dweights - weights @ dweights) * scale
                dq[b, s, h] += dscores @ keys
                dk[b, : s + 1, g] += torch.outer(dscores, q[b, s, h])
                dv[b, : s + 1, g] += torch.outer(weights, dout[b, s, h])
    for got, exact in zip(found, (dq, dk, dv), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("epilogue", ALL)
@pytest.mark.parametrize("biased", [False, True])
def test_fused_linear_written_out(epilogue: str, biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64) if biased else None
    got = kernels.fused_linear(x, weight, bias, epilogue)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.ops.treadle.fused_linear(x, weight, bias, epilogue), got)
    for index in ((0, 0), (1, 2)):
        sums = [sum(float(a * b) for a, b in zip(x[index], row, strict=True)) for row in weight]
        sums = [total + (float(bias[i]) if bias is not None else 0.0) for i, total in enumerate(sums)]
        silu = [u / (1 + math.exp(-u)) for u in sums]
        exact = {
            "none": sums,
            "relu2": [max(u, 0.0) ** 2 for u in sums],
            "gelu_tanh": [0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) for u in sums],
            "silu": silu,
            "swiglu": [a * b for a, b in zip(silu[:4], sums[4:], strict=True)],
        }[epilogue]
        torch.testing.assert_close(got[index], torch.tensor(exact, dtype=torch.float64))


def test_fused_linear_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are recorded the definition runs, whatever was named; without, the operator."""
    asked = []
    monkeypatch.setattr(kernels.Operation, "worthwhile", lambda *args: asked.append(args) or True)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    kernels.fused_linear(x, weight, None, "silu").sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert not asked
    with torch.no_grad():
        kernels.fused_linear(x, weight, None, "silu")
    assert len(asked) == 1


def test_the_table_of_times() -> None:
    from treadle.kernels.measure import Finding, table
    from treadle.kernels.tables import Row

    row = Row("rms_norm", "bfloat16", 4, 8, 10.0, 25.0, {"torch": 50.0, "mojo": 12.5})
    errors = [Finding("rms_norm", "mojo", "bfloat16", (2, 8), error, 1e-3) for error in (2e-3, 1e-3)]
    lines = list(table([row], errors))
    assert lines[2:] == [
        "| rms_norm | bfloat16 | 4 x 8 | 10.0 | torch | - | 50.0 | 20% | 2.00 |",
        "| rms_norm | bfloat16 | 4 x 8 | 10.0 | mojo | 2.0e-03 | 12.5 | 80% | 0.50 |",
        "| rms_norm | bfloat16 | 4 x 8 | 10.0 | compiled | - | 25.0 | 40% | 1.00 |",
    ]
