"""Every backend that runs on this machine against the reference, and the reference against a loop over positions."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.attention import BACKENDS, AttentionContext, AttentionFacts, Cache, TokenCache, attend, choose, flash, flex
from treadle.attention.facts import alibi_slopes, visible
from treadle.errors import ConfigError


def tensors(B: int, S: int, H: int, G: int, K: int, V: int | None = None, seed: int = 0) -> list[Tensor]:
    """q_BSHK, k_BSGK, v_BSGV; V is K unless it is given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, K), (G, K), (G, V or K))
    return [torch.randn(B, S, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def sink_logits(H: int, facts: AttentionFacts) -> list[Tensor]:
    """The last argument of `attend`, if these facts have it."""
    return [torch.linspace(-2, 3, H, dtype=torch.float64)] if facts.sinks else []


def slope_by_hand(h: int, heads: int) -> float:
    """The recipe of Press et al., as their text has it: a geometric sequence that starts at its own ratio."""
    if heads & (heads - 1) == 0:
        return (2 ** (-8 / heads)) ** (h + 1)
    lower = 1 << (heads.bit_length() - 1)
    return slope_by_hand(h, lower) if h < lower else slope_by_hand(2 * (h - lower), 2 * lower)


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, facts: AttentionFacts, documents: list[list[int]], sinks: Tensor | None = None
) -> Tensor:
    """The definition, one query at a time."""
    B, S, H, K = q.shape
    out = q.new_zeros(B, S, H, v.shape[-1])
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[2])
            for i in range(S):
                first = 0 if facts.window is None else max(0, i - facts.window + 1)
                seen = [j for j in range(first, i + 1) if documents[b][j] == documents[b][i]]
                scores = torch.stack([q[b, i, h] @ k[b, j, g] for j in seen]) * (facts.scale or 1 / math.sqrt(K))
                if facts.softcap is not None:
                    scores = facts.softcap * torch.tanh(scores / facts.softcap)
                if facts.alibi:
                    scores = scores - slope_by_hand(h, H) * torch.tensor([i - j for j in seen])
                weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[h].exp()))
                out[b, i, h] = sum(w * v[b, j, g] for w, j in zip(weights, seen, strict=True))
    return out


facts_strategy = st.builds(
    AttentionFacts,
    scale=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 3, 8, 100]),
    softcap=st.sampled_from([None, 2.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], AttentionFacts, list[list[int]]]:
    B, S, G, R = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    documents = [sorted(draw(st.lists(st.integers(0, 3), min_size=S, max_size=S))) for _ in range(B)]
    V = draw(st.sampled_from([4, 3, 6]))
    return tensors(B, S, G * R, G, 4, V, draw(st.integers(0, 99))), draw(facts_strategy), documents


@settings(max_examples=60, deadline=None)
@given(cases())
def test_reference_is_the_definition(case: tuple[list[Tensor], AttentionFacts, list[list[int]]]) -> None:
    qkv, facts, documents = case
    context = AttentionContext.packed(torch.tensor(documents), backend="reference")
    sinks = sink_logits(qkv[0].shape[2], facts)
    torch.testing.assert_close(attend(*qkv, facts, context, *sinks), by_hand(*qkv, facts, documents, *sinks))


def test_alibi_slopes_are_those_of_bloom_and_mpt() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    for heads in range(1, 65):
        slopes_H = alibi_slopes(heads)
        mask_BS = torch.ones(1, 9)
        theirs = bloom.build_alibi_tensor(mask_BS, heads, torch.float32)[:, 0]
        torch.testing.assert_close(slopes_H[:, None] * torch.arange(9), theirs, rtol=1e-5, atol=0)
        theirs = mpt.build_mpt_alibi_tensor(heads, 9)[:, 0]
        torch.testing.assert_close(slopes_H[:, None] * torch.arange(-8, 1), theirs, rtol=1e-5, atol=0)


def with_gradients(qkv: list[Tensor], facts: AttentionFacts, context: AttentionContext) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (*qkv, *sink_logits(qkv[0].shape[2], facts))]
    out = attend(*leaves[:3], facts, context, *leaves[3:])
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
@pytest.mark.parametrize(("alibi", "sinks"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("V", [8, 5, 12])
def test_sdpa_equals_reference_with_gradients(
    V: int, alibi: bool, sinks: bool, window: int | None, packed: bool
) -> None:
    qkv, facts = tensors(2, 64, 6, 2, 8, V), AttentionFacts(window=window, alibi=alibi, sinks=sinks)
    documents_BS = (torch.arange(64) // 23).expand(2, 64)
    results = []
    for backend in ("sdpa", "reference"):
        context = (
            AttentionContext.packed(documents_BS, backend=backend)
            if packed
            else AttentionContext.causal(2, 64, backend=backend)
        )
        results.append(with_gradients(qkv, facts, context))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_sdpa_equals_reference_whatever_the_facts(case: tuple[list[Tensor], AttentionFacts, list[list[int]]]) -> None:
    qkv, facts, documents = case
    facts = replace(facts, softcap=None)
    results = [
        with_gradients(qkv, facts, AttentionContext.packed(torch.tensor(documents), backend=backend))
        for backend in ("sdpa", "reference")
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([None, 1, 100, 128, 129, 300]),
    st.lists(st.integers(1, 200), min_size=1, max_size=6),
    st.sampled_from(
        [{}, {"softcap": 3.0}, {"alibi": True}, {"sinks": True}, {"softcap": 3.0, "alibi": True, "sinks": True}]
    ),
    st.sampled_from([16, 8, 24]),
)
def test_flex_visits_every_chunk_that_matters(
    window: int | None, lengths: list[int], more: dict[str, Any], V: int
) -> None:
    S = sum(lengths)
    documents_BS = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    facts = AttentionFacts(window=window, **more)
    context = AttentionContext.packed(documents_BS)
    dense = flex.block_mask(facts, context).to_dense()[0, 0].bool()
    seen = visible(facts, context, S)[0]
    for i in range(dense.shape[0]):
        for j in range(dense.shape[1]):
            chunk = seen[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert dense[i, j] or not chunk.any(), (i, j)
    qkv = [t.float() for t in tensors(1, S, 3, 1, 16, V)]
    sinks = [t.float() for t in sink_logits(3, facts)]
    reference = attend(*qkv, facts, AttentionContext.packed(documents_BS, backend="reference"), *sinks)
    assert (flex.attend(*qkv, facts, context, *sinks) - reference).abs().max() < 1e-5


def test_flex_passes_gradients_to_sinks() -> None:
    qkv, facts = [t.float() for t in tensors(1, 40, 3, 1, 16)], AttentionFacts(alibi=True, sinks=True)
    gradients = []
    for backend in (flex, BACKENDS["reference"]):
        sinks_H = sink_logits(3, facts)[0].float().requires_grad_()
        backend.attend(*qkv, facts, AttentionContext.causal(1, 40), sinks_H).square().sum().backward()
        gradients.append(sinks_H.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("more", [{}, {"alibi": True, "sinks": True}])
@pytest.mark.parametrize(("H", "G", "V"), [(4, 2, 8), (3, 1, 5), (2, 2, 12)])
def test_a_cache_gives_the_same_as_the_whole_row(H: int, G: int, V: int, more: dict[str, Any], backend: str) -> None:
    qkv, facts = tensors(2, 20, H, G, 8, V), AttentionFacts(window=6, **more)
    sinks = sink_logits(H, facts)
    whole = attend(*qkv, facts, AttentionContext.causal(2, 20, backend="reference"), *sinks)
    cache = TokenCache(2, 20, [(G, 8), (G, V)], torch.float64, "cpu")
    start, pieces = 0, []
    for size in (7, 1, 1, 11):
        q, k, v = (t[:, start : start + size] for t in qkv)
        positions_BS = torch.arange(start, start + size).expand(2, size)
        context = AttentionContext(positions_BS, backend=backend, cache=cache)
        pieces.append(attend(q, *cache.append(k, v), facts, context, *sinks))
        start += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    with pytest.raises(ValueError, match="holds 20 tokens"):
        cache.append(qkv[1][:, :1], qkv[2][:, :1])
    assert Cache({0: cache})[0] is cache


def test_a_named_backend_is_obeyed_or_refused() -> None:
    q = torch.zeros(1, 4, 2, 8)
    for name, reason in (
        ("flash", "runs on CUDA only"),
        ("flash4", "runs on CUDA only"),
        ("flex", "trains on CUDA only"),
    ):
        with pytest.raises(ConfigError, match=f"'{name}' cannot be used here: it {reason}.*Able: reference, sdpa"):
            choose(q, AttentionFacts(), AttentionContext.causal(1, 4, backend=name))
    with pytest.raises(ConfigError, match="'sdpa' cannot be used here: it has no softcap"):
        choose(q, AttentionFacts(softcap=5.0), AttentionContext.causal(1, 4, backend="sdpa"))
    with pytest.raises(ConfigError, match=r"'spda' is unknown. Did you mean 'sdpa'\?"):
        choose(q, AttentionFacts(), AttentionContext.causal(1, 4, backend="spda"))
    assert choose(q, AttentionFacts(), AttentionContext.causal(1, 4)) == "sdpa"
    assert choose(q, AttentionFacts(softcap=5.0), AttentionContext.causal(1, 4)) == "reference"
    assert choose(q, AttentionFacts(alibi=True, sinks=True), AttentionContext.causal(1, 4)) == "sdpa"
    with pytest.raises(ValueError, match=r"facts.sinks is True, sinks_H is missing"):
        attend(q, q, q, AttentionFacts(sinks=True), AttentionContext.causal(1, 4))
    assert set(BACKENDS) == {"reference", "sdpa", "flash", "flash4", "flex", "tilelang"}


def test_packed_context_marks_every_document() -> None:
    context = AttentionContext.packed(torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, 6, 6]]), boundaries=9)
    assert context.positions_BS.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    assert context.cumulative_lengths_N is not None
    assert context.cumulative_lengths_N.tolist() == [0, 2, 5, 6, 8, 10, 10, 10, 10]


def test_flash_is_not_given_documents_without_their_lengths() -> None:
    q = torch.zeros(1, 4, 2, 8, device="meta", dtype=torch.bfloat16)
    bare = AttentionContext(torch.zeros(1, 4), documents_BS=torch.zeros(1, 4, dtype=torch.int32))
    # On a meta device the first reason is another; ask for this one as CUDA would.
    q = type("OnCuda", (), {"device": torch.device("cuda"), "dtype": q.dtype, "shape": q.shape})()
    assert "AttentionContext.packed" in str(flash.unsupported(q, AttentionFacts(), bare))
    packed = AttentionContext.packed(torch.zeros(1, 4))
    assert flash.unsupported(q, AttentionFacts(), packed) is None
    assert flash.unsupported(q, AttentionFacts(), packed, value_dim=256) is None
    assert "at most 256, not 264" in str(flash.unsupported(q, AttentionFacts(), packed, value_dim=264))


@pytest.mark.parametrize("V", [8, 5, 12])
def test_flash_is_given_one_head_dim(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on CUDA only; here a stand-in of its interface, which knows one head dim and needs the scale."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, scale: float, window_size: Any, **more: Any) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        attention = torch.nn.functional.scaled_dot_product_attention
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    monkeypatch.setattr(flash, "varlen_attn", kernel)
    qkv, context = tensors(1, 30, 4, 2, 8, V), AttentionContext.causal(1, 30, backend="reference")
    for scale in (None, 0.3):
        facts = AttentionFacts(scale=scale)
        torch.testing.assert_close(flash.attend(*qkv, facts, context), attend(*qkv, facts, context))
