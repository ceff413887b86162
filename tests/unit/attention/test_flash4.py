"""FlashAttention 4 without its package and without a GPU: what is asked of it, and what is made of its answers."""

import sys
from itertools import pairwise, product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from treadle.attention import AttentionContext, AttentionFacts, attend, flash4

B, S, H, G, K, V = 2, 24, 4, 2, 8, 16


def hidden(length: int, window: int | None) -> Tensor:
    distance_TT = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return (distance_TT < 0) | (distance_TT >= (window or length))


def pieces(q: Tensor, causal: bool, rest: dict[str, Any]) -> tuple[int | None, list[slice]]:
    """The window, and the documents of what lies end to end, as the options say them."""
    assert causal == ("window_size_left" not in rest)
    assert causal or rest["window_size_right"] == 0
    ends = rest["cu_seqlens_q"].tolist() if "cu_seqlens_q" in rest else list(range(0, B * S + 1, S))
    documents = [slice(a, b) for a, b in pairwise(ends) if b > a]
    assert rest.get("max_seqlen_q", S) >= max(each.stop - each.start for each in documents)
    assert q.ndim == (3 if "cu_seqlens_q" in rest else 4)
    return (None if causal else rest["window_size_left"] + 1), documents


def forward(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, softmax_scale: float, causal: bool, **rest: Any):
    """With the names and layouts of the package's function, one head of a document at a time."""
    assert return_lse
    window, documents = pieces(q, causal, rest)
    out_THV, lse_HT = torch.empty(B * S, H, V, dtype=q.dtype), torch.empty(H, B * S)
    for d, h in product(documents, range(H)):
        q_TK, k_TK, v_TV = (x.reshape(B * S, *x.shape[-2:])[d, h * x.shape[-2] // H] for x in (q, k, v))
        scores_TT = (softmax_scale * q_TK @ k_TK.T).masked_fill(hidden(len(q_TK), window), float("-inf"))
        out_THV[d, h], lse_HT[h, d] = scores_TT.softmax(-1) @ v_TV, scores_TT.logsumexp(-1).float()
    lse = lse_HT if q.ndim == 3 else lse_HT.view(H, B, S).transpose(0, 1).contiguous()
    return out_THV.view(*q.shape[:-1], V), lse


def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **rest: Any):
    """FlashAttention's own formulas (arXiv:2205.14135, algorithm 4) without its tiles."""
    scale = rest.pop("softmax_scale")
    window, documents = pieces(q, rest.pop("causal"), rest)
    lse_HT = lse if q.ndim == 3 else lse.transpose(0, 1).reshape(H, B * S)
    dq, dk, dv = (torch.zeros(B * S, *x.shape[-2:], dtype=q.dtype) for x in (q, k, v))
    for d, h in product(documents, range(H)):
        g, each = h * G // H, []
        for x, head in ((q, h), (k, g), (v, g), (out, h), (dout, h)):
            each.append(x.reshape(B * S, *x.shape[-2:])[d, head])
        q_TK, k_TK, v_TV, out_TV, dout_TV = each
        p_TT = (scale * q_TK @ k_TK.T - lse_HT[h, d, None]).exp().masked_fill(hidden(len(q_TK), window), 0.0)
        ds_TT = p_TT * (dout_TV @ v_TV.T - (dout_TV * out_TV).sum(-1, keepdim=True))
        dq[d, h] += scale * ds_TT @ k_TK
        dk[d, g] += scale * ds_TT.T @ q_TK
        dv[d, g] += p_TT.T @ dout_TV
    return dq.view_as(q), dk.view_as(k), dv.view_as(v)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fact", [{}, {"window": 5}, {"scale": 0.3}])
def test_it_is_asked_for_what_the_reference_computes(
    package: None, fact: dict[str, Any], packed: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    documents_BS = (torch.rand(B, S) < 0.2).cumsum(1)
    context = AttentionContext.packed(documents_BS, boundaries=40) if packed else AttentionContext.causal(B, S)
    q, k, v, grad = (torch.randn(B, S, h, d, dtype=torch.float64) for h, d in ((H, K), (G, K), (G, V), (H, V)))
    facts, results = AttentionFacts(**fact), []
    function = torch.compile(flash4.attend, backend="aot_eager", fullgraph=True) if compiled else flash4.attend
    for each in (function, attend):
        seen = AttentionContext(
            context.positions_BS, context.documents_BS, context.cumulative_lengths_N, S, backend="reference"
        )
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = each(*leaves, facts, seen)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)  # the log of the sum is float32


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 4, 2, 64, dtype=torch.bfloat16)
    plain = AttentionContext.causal(1, 4)
    assert "CUDA only" in str(flash4.unsupported(q, AttentionFacts(), plain))
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": q.dtype, "shape": q.shape})()
    assert "treadle[flash4]" in str(flash4.unsupported(on_gpu, AttentionFacts(), plain))
    monkeypatch.setattr(flash4, "_missing", lambda: None)
    assert flash4.unsupported(on_gpu, AttentionFacts(window=3), plain) is None
    for fact in ({"softcap": 5.0}, {"alibi": 1.0}, {"sinks": True}):
        assert next(iter(fact)) in str(flash4.unsupported(on_gpu, AttentionFacts(**fact), plain))
    assert "up to 128" in str(flash4.unsupported(on_gpu, AttentionFacts(), plain, 192))
