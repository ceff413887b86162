"""Rows cut into parts: what each part may see is what the whole row says, whatever the documents."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.attention import AttentionContext, AttentionFacts, attend, flash, flex, ring, tables
from treadle.attention.chunks import Pairs, fusible
from treadle.attention.context_parallel import in_rank_order, in_row_order, shared
from treadle.attention.facts import visible
from treadle.attention.parts import Parts
from treadle.errors import ConfigError
from treadle.nn.rope_scaling import document_lengths


def all_parts(order: Any, size: int, method: Any = "gather") -> list[Parts]:
    return [Parts(method, order, "group", rank, size) for rank in range(size)]


@st.composite
def rows(draw: st.DrawFn, longest: int = 5) -> tuple[AttentionContext, list[Parts]]:
    """Two rows with documents that end anywhere, and how they are cut."""
    size, order = draw(st.integers(2, 4)), draw(st.sampled_from(["zigzag", "contiguous"]))
    length = size * (2 if order == "zigzag" else 1) * draw(st.integers(1, longest))
    if draw(st.booleans()):
        return AttentionContext.causal(2, length), all_parts(order, size)
    ends = draw(st.lists(st.sets(st.integers(1, length), max_size=6), min_size=2, max_size=2))
    documents = torch.zeros(2, length, dtype=torch.int32)
    for row, places in enumerate(ends):
        for place in places:
            documents[row, place:] += 1
    return AttentionContext.packed(documents), all_parts(order, size)


windows = st.sampled_from([None, 1, 3, 8])


@settings(max_examples=60, deadline=None)
@given(rows())
def test_parts_make_the_whole(case: tuple[AttentionContext, list[Parts]]) -> None:
    whole, parts = case
    for x in (whole.positions_BS, torch.randn(2, whole.positions_BS.shape[1], 3)):
        pieces = torch.cat([one.cut(x) for one in parts], dim=1)
        assert torch.equal(parts[0].to_rank_order(x), pieces)
        assert torch.equal(parts[0].to_row_order(pieces), x)
        assert torch.equal(torch.cat([parts[0].cut(x, rank) for rank in range(len(parts))], dim=1), pieces)


@settings(max_examples=60, deadline=None)
@given(rows(), windows)
def test_what_a_gathered_part_sees(case: tuple[AttentionContext, list[Parts]], window: int | None) -> None:
    whole, parts = case
    facts = AttentionFacts(window=window)
    S = whole.positions_BS.shape[1]
    expected = visible(facts, whole, S)
    for part in parts:
        cut = whole.cut(part)
        seen = visible(facts, in_rank_order(cut), S).expand(2, -1, -1)
        assert torch.equal(part.to_row_order(seen, dim=2), part.cut(expected))
        lengths = document_lengths(whole)
        assert torch.equal(document_lengths(cut), lengths if lengths.shape[1] == 1 else part.cut(lengths))


@settings(max_examples=60, deadline=None)
@given(rows(), windows)
def test_what_meets_in_a_ring(case: tuple[AttentionContext, list[Parts]], window: int | None) -> None:
    """Pairs of chunks together see what the whole rows see, once each; the first lets each query see itself."""
    whole, parts = case
    S = whole.positions_BS.shape[1]
    expected = visible(AttentionFacts(window=window), whole, S).int()
    own = S // len(parts)
    for part in parts:
        facts = AttentionFacts(scale=1.0, window=window)
        pairs = replace(Pairs.of(torch.zeros(2, own, 4, 8), whole.documents_BS, facts, part, fused=False), piece=2)
        found = torch.zeros(2, own, S, dtype=torch.int32)
        for source in [(part.rank - step) % part.size for step in range(part.size)]:
            for pair in pairs.seen(source):
                keys = slice(source * own + pair.keys.start, source * own + pair.keys.stop)
                seen = visible(pair.facts, pair.context, pairs.chunk).int()
                found[:, pair.queries, keys] += seen
                assert found[:, pair.queries].any(dim=2).all(), "merging needs one visible key at least"
        assert torch.equal(part.to_row_order(found, dim=2), part.cut(expected))


def test_zigzag_parts_have_equal_work() -> None:
    whole = AttentionContext.causal(1, 48)
    for size in (2, 3, 4):
        work = [
            visible(AttentionFacts(), in_rank_order(whole.cut(part)), 48).sum() for part in all_parts("zigzag", size)
        ]
        assert len({int(count) for count in work}) == 1


@settings(max_examples=10, deadline=None)
@given(
    rows(longest=60),
    st.sampled_from([None, 1, 100, 200]),
    st.sampled_from([{}, {"softcap": 3.0}, {"alibi": 0.5, "sinks": True}, {"alibi": 1.0, "heads": (2, 8)}]),
)
def test_flex_of_a_gathered_part(
    case: tuple[AttentionContext, list[Parts]], window: int | None, more: dict[str, Any]
) -> None:
    """Chunks of 128 tokens reach over borders of parts; none that matters is left out."""
    whole, parts = case
    facts, S = AttentionFacts(window=window, **more), whole.positions_BS.shape[1]
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(2, S, heads, 16, generator=generator) for heads in (4, 2, 2))
    sinks = [torch.linspace(-1, 1, 4)] if facts.sinks else []
    expected = attend(q, k, v, facts, replace(whole, backend="reference"), *sinks)
    k, v = parts[0].to_rank_order(k), parts[0].to_rank_order(v)
    for part in parts:
        context = in_rank_order(whole.cut(part))
        visited = flex.block_mask(facts, context).to_dense()[:, 0].bool()
        seen = visible(facts, context, S).expand(2, -1, -1)
        for i in range(visited.shape[1]):
            for j in range(visited.shape[2]):
                some = seen[:, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].flatten(1).any(1)
                assert (visited[:, i, j] | ~some).all()
        found = flex.attend(part.cut(q), k, v, facts, context, *sinks)
        assert (found - part.cut(expected)).abs().max() < 1e-5
        assert "queries' own tokens" in str(flash.unsupported(_OnCuda(q), facts=AttentionFacts(), context=context))


class _OnCuda:
    """What a backend asks of a tensor, as if it were on a GPU."""

    device, dtype = torch.device("cuda"), torch.bfloat16

    def __init__(self, like: torch.Tensor):
        self.shape = like.shape


def test_flex_skips_what_no_part_sees() -> None:
    """Zigzag parts of whole blocks: each rank visits the triangle's share, not all of it."""
    whole = AttentionContext.causal(1, 8 * 256)
    for part in all_parts("zigzag", 4):
        visited = flex.block_mask(AttentionFacts(), in_rank_order(whole.cut(part))).to_dense()[0, 0]
        assert visited.shape == (4, 16)
        assert int(visited.sum()) == 16 * 17 // 2 // 4


@pytest.mark.parametrize("method", ["gather", "ulysses"])
def test_layers_find_their_tables_made(method: str) -> None:
    """A layer that is recomputed computes none of them again: what its mask is made of is what was handed to it."""
    documents_BS = torch.tensor([[0] * 100 + [1] * 300 + [2] * 112])
    cut = AttentionContext.packed(documents_BS).cut(all_parts("zigzag", 2, method)[1])
    facts = AttentionFacts(window=200)
    local, made = shared(torch.zeros(1, 256, 1, 8), facts, cut, 8)
    assert local is not None
    made = made | {flex.key(facts): flex.tables(facts, local)}
    as_layers_do = in_rank_order if method == "gather" else in_row_order
    context = as_layers_do(replace(cut, tables=made))
    mask = flex.block_mask(facts, context)
    assert mask.seq_lengths == (context.positions_BS.shape[1], 512)
    given = {id(tensor) for tensors in made.values() for tensor in tensors}
    assert {id(t) for t in (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices)} <= given
    if method == "gather":
        assert context.keys is not None
        assert {id(t) for t in vars(context.keys).values()} <= given
    fresh = flex.block_mask(facts, as_layers_do(cut))
    assert torch.equal(mask.to_dense(), fresh.to_dense())


def test_only_what_is_used_is_made() -> None:
    whole = AttentionContext.causal(1, 256)
    cut = {m: whole.cut(all_parts("zigzag", 2, m)[0]) for m in ("gather", "ring", "ulysses")}
    made = {m: tables(AttentionFacts(window=9), (16, 16), torch.float32, context) for m, context in cut.items()}
    places, there = made.pop("gather")["keys of all ranks"]
    assert places.tolist() == [*range(64), *range(192, 256)]
    assert there.tolist() == [*range(64), *range(192, 256), *range(64, 192)]
    assert made == {"ring": {}, "ulysses": {}}


def test_rows_that_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="rows of 14 tokens cannot be cut into 4 chunks of equal size"):
        AttentionContext.causal(1, 14).cut(all_parts("zigzag", 2)[0])


def test_moving_a_context_moves_the_whole_rows_too() -> None:
    context = AttentionContext.packed(torch.tensor([[0, 0, 1, 1]])).cut(all_parts("contiguous", 2)[1])
    moved = context.to("meta")
    assert moved.positions_BS.is_meta
    assert moved.whole.positions_BS.is_meta
    assert moved.whole.documents_BS.is_meta
    assert moved.parts == context.parts


def test_a_cache_is_not_read_from_cut_rows() -> None:
    context = replace(AttentionContext.causal(1, 4).cut(all_parts("contiguous", 2)[0]), cache=object())
    x = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ConfigError, match="a cache cannot be read where rows are cut"):
        attend(x, x, x, AttentionFacts(), context)


@pytest.mark.parametrize("facts", [AttentionFacts(), AttentionFacts(scale=0.3), AttentionFacts(window=5)])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [2, 3])
def test_gathered_chunks_equal_whole_rows(size: int, order: str, facts: AttentionFacts) -> None:
    """Outputs and gradients, with PyTorch's fused kernels where they can, against the definition on whole rows."""
    torch.manual_seed(0)
    whole = AttentionContext.causal(2, 12 * size)
    q, k, v, dout = (torch.randn(2, 12 * size, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*exact, facts, replace(whole, backend="reference"))
    out.backward(dout)
    sums = [torch.zeros_like(x) for x in (k, v)]
    for part in all_parts(order, size):
        mine = [part.cut(q), part.to_rank_order(k), part.to_rank_order(v)]
        leaves = [x.clone().requires_grad_() for x in mine]
        context = whole.cut(part)
        assert fusible(leaves[0], facts, context, 8) == (facts.window is None)
        got = ring.attend(*leaves, facts, context, None)
        got.backward(part.cut(dout))
        torch.testing.assert_close(got, part.cut(out), rtol=0, atol=1e-12)
        torch.testing.assert_close(leaves[0].grad, part.cut(exact[0].grad), rtol=0, atol=1e-12)
        for total, leaf in zip(sums, leaves[1:], strict=True):
            total += part.to_row_order(leaf.grad)
    for total, leaf in zip(sums, exact[1:], strict=True):
        torch.testing.assert_close(total, leaf.grad, rtol=0, atol=1e-12)
