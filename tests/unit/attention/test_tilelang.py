"""Attention through TileLang without it and without a GPU: what it refuses, and what its kernels are asked for."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from treadle.attention import AttentionContext, AttentionFacts, Cache, TokenCache, attend, choose, tilelang
from treadle.errors import ConfigError
from treadle.kernels import operation

B, S, H, G, K = 2, 24, 4, 2, 8
PLAIN = AttentionContext.causal(1, 256, backend="tilelang")


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """-> scores_BHST, of which later keys are out of sight."""
    k_BSHK = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bshk,bthk->bhst", q, k_BSHK).mul(scale).masked_fill(later, float("-inf"))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s_BHST, v_BSHK = scores(q, k, scale), v.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bhst,bthk->bshk", s_BHST.softmax(-1), v_BSHK), s_BHST.logsumexp(-1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's formulas (arXiv:2205.14135, algorithm 4) without its tiles."""
    R = q.shape[2] // k.shape[2]
    p_BHST = (scores(q, k, scale) - log_sum[..., None]).exp()
    dp_BHST = torch.einsum("bshk,bthk->bhst", dout, v.repeat_interleave(R, 2))
    ds_BHST = scale * p_BHST * (dp_BHST - (dout * out).sum(-1).transpose(1, 2)[..., None])
    dq = torch.einsum("bhst,bthk->bshk", ds_BHST, k.repeat_interleave(R, 2))
    dk, dv = (torch.einsum("bhst,bshk->bthk", a, b) for a, b in ((ds_BHST, q), (p_BHST, dout)))
    return dq, *(x.unflatten(2, (-1, R)).sum(3) for x in (dk, dv))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("causal_attention_tilelang")
    module.causal_attention, module.causal_attention_backward = forward, backward
    monkeypatch.setattr(operation, "_module", lambda name, backend: module)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_asked_for_what_the_reference_computes(package: None, scale: float | None, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(B, S, heads, K, dtype=torch.float64) for heads in (H, G, G, H))
    facts, results = AttentionFacts(scale=scale), []
    function = torch.compile(tilelang.attend, backend="aot_eager", fullgraph=True) if compiled else tilelang.attend
    for each in (function, attend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = each(*leaves, facts, AttentionContext.causal(B, S, backend="reference"))
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


def on_gpu(length: int = 256, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Any:
    shape = torch.Size((1, length, 2, head_dim))
    return type("OnGpu", (), {"device": torch.device("cuda"), "dtype": dtype, "shape": shape})()


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 256, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="'tilelang' cannot be used here: it runs on CUDA only"):
        choose(q, AttentionFacts(), PLAIN)
    monkeypatch.setattr(tilelang, "_missing", lambda: None)
    assert tilelang.unsupported(on_gpu(), AttentionFacts(), PLAIN) is None
    assert "only where it is named" in str(tilelang.unsupported(on_gpu(), AttentionFacts(), PLAIN.causal(1, 256)))
    for fact in ({"window": 9}, {"softcap": 5.0}, {"alibi": 1.0}, {"sinks": True}):
        assert next(iter(fact)) in str(tilelang.unsupported(on_gpu(), AttentionFacts(**fact), PLAIN))
    packed = AttentionContext.packed(torch.zeros(1, 256, dtype=torch.int32), backend="tilelang")
    cached = AttentionContext(PLAIN.positions_BS, backend="tilelang", cache=Cache({0: TokenCache}))
    for q, context, value_dim, reason in (
        (on_gpu(), packed, None, "one document each"),
        (on_gpu(), cached, None, "no cache"),
        (on_gpu(), PLAIN, 96, "head dim 64, not 96"),
        (on_gpu(length=100), PLAIN, None, "multiples of 128, not 100"),
        (on_gpu(head_dim=96), PLAIN, None, "64 and 128, not 96"),
        (on_gpu(dtype=torch.float32), PLAIN, None, "bf16 or fp16"),
    ):
        assert reason in str(tilelang.unsupported(q, AttentionFacts(), context, value_dim))
