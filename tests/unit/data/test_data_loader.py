"""Batches: against a loop that packs naively, on any ranks, from any step, with documents kept apart or not."""

import gc
import json
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from data_zoo import EOS, documents, shape, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.data.dataset import Part, TokenDataset, check_vocabulary
from treadle.data.loader import Loader, Sequential
from treadle.data.packing import Batch, boundaries
from treadle.data.prefetch import Prefetch
from treadle.errors import ConfigError, DataError

S = 16


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Two datasets of documents of 1 to 30 tokens, with no token in both but the end of a document."""
    folder = tmp_path_factory.mktemp("datasets")
    small = written(folder / "small", documents(shape(1, 20, 30)), shard_tokens=50)
    large = written(folder / "large", documents(shape(2, 90, 30), first=5000), shard_tokens=300)
    return [small, large]


def loader(datasets: list[TokenDataset], **changes: object) -> Loader:
    settings: dict = {"weights": [1.0, 3.0], "sequence_length": S, "batch_size": 24, "seed": 5} | changes
    return Loader(datasets, **settings)


def stream(dataset: TokenDataset) -> list[int]:
    return np.concatenate(list(dataset.each_document())).tolist()


def isolated(row: list[int], begins: set[int], start: int) -> tuple[list[int], list[int], list[int]]:
    """Targets, document numbers and positions of one row, token by token."""
    targets, numbers, positions = [], [], []
    number = position = 0
    for i in range(len(row) - 1):
        if i > 0 and start + i + 1 in begins:  # the end of a document, with which the next one opens
            number, position = number + 1, 0
        targets.append(row[i + 1])
        numbers.append(number)
        positions.append(position)
        position += 1
    return targets, numbers, positions


def check_against_naive(batch: Batch, datasets: list[TokenDataset]) -> None:
    """Find each row in its dataset's stream, and compare all that the batch says about it."""
    cumulative = [0]
    for b, source in enumerate(batch.sources_B.tolist()):
        tokens, whole = batch.tokens_BS[b].tolist(), stream(datasets[source])
        begins = set(np.cumsum([len(d) for d in datasets[source].each_document()]).tolist()) | {0}
        (start,) = [i for i in range(0, len(whole) - S, S) if whole[i : i + S] == tokens]
        targets, numbers, positions = isolated(whole[start : start + S + 1], begins, start)
        assert batch.targets_BS[b].tolist() == targets
        assert batch.context.documents_BS[b].tolist() == numbers
        assert batch.context.positions_BS[b].tolist() == positions
        cumulative += [b * S + i for i in range(S) if positions[i] == 0 and (b, i) != (0, 0)]
    B = len(batch.tokens_BS)
    padded = cumulative + [B * S] * (len(batch.context.cumulative_lengths_N) - len(cumulative))
    assert batch.context.cumulative_lengths_N.tolist() == padded
    assert len(batch.context.cumulative_lengths_N) == boundaries(len(cumulative))
    assert batch.context.max_length == S
    assert batch.valid_tokens == int((batch.targets_BS != -100).sum())


def test_isolated_rows_equal_a_naive_loop(datasets: list[TokenDataset]) -> None:
    for step in range(6):
        check_against_naive(loader(datasets).batch(step), datasets)


def test_many_documents_equal_a_naive_loop(datasets: list[TokenDataset]) -> None:
    batch = loader(datasets).samples(100, 180)
    check_against_naive(batch, datasets)
    assert len(batch.context.cumulative_lengths_N) == 256


def test_without_isolation_every_target_counts(datasets: list[TokenDataset]) -> None:
    apart, together = loader(datasets).batch(2), loader(datasets, isolate_documents=False).batch(2)
    assert together.tokens_BS.tolist() == apart.tokens_BS.tolist()
    assert together.valid_tokens == apart.valid_tokens == 24 * S
    assert together.targets_BS.equal(apart.targets_BS)
    assert (together.targets_BS[:, :-1] == together.tokens_BS[:, 1:]).all()
    assert together.context.documents_BS is None
    assert together.context.positions_BS.tolist() == [list(range(S))] * 24


def test_the_end_of_a_document_is_predicted_and_the_next_one_from_it_alone(datasets: list[TokenDataset]) -> None:
    """Where sampling starts from: the end-of-text token at position 0, and a document's first token after it."""
    batch = loader(datasets).batch(0)
    ends = batch.tokens_BS == EOS
    assert (batch.context.positions_BS[ends] == 0).all()
    assert (batch.targets_BS[ends] != -100).all()
    assert (batch.targets_BS[ends] != EOS).any()
    assert (batch.targets_BS == EOS).any()


class Unended(TokenDataset):
    """Documents end in no end-of-text token, but for those that end in EOS."""

    def ended(self, last: np.ndarray) -> np.ndarray:
        return last == EOS


def in_memory(kind: type[TokenDataset], tokens: list[int], offsets: list[int], **facts: object) -> TokenDataset:
    part = Part("memory", np.array(tokens, dtype=np.uint16), np.array(offsets, dtype=np.int64))
    return kind("memory", [part], fingerprint="memory", **facts)


@pytest.mark.parametrize("kind", [TokenDataset, Unended])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 19, 30])
@pytest.mark.parametrize("offsets", [[0, 5, 5, 5, 9, 20], [0, 0, 1, 2, 6, 20, 20], [0, 20]])
def test_valid_tokens_are_exact_with_empty_documents(kind: type[TokenDataset], length: int, offsets: list[int]) -> None:
    tokens = list(range(1, 21))
    for end in offsets[2:4]:
        tokens[end - 1] = EOS
    dataset = in_memory(kind, tokens, offsets)
    borders = set(offsets) - {0, 20}
    ended = borders if kind is TokenDataset else {border for border in borders if tokens[border - 1] == EOS}
    held = Sequential(dataset, sequence_length=length, batch_size=1)
    for start, batch in zip(range(0, 19, length), held, strict=True):
        size = min(length, 19 - start)
        expected = [-100 if start + i + 1 in borders - ended else tokens[start + i + 1] for i in range(size)]
        assert batch.targets_BS[0].tolist() == expected + [-100] * (length - size)
        assert batch.valid_tokens == sum(target != -100 for target in expected)
        opened = {border - 1 - start for border in ended} | {border - start for border in borders - ended} | {0}
        positions = batch.context.positions_BS[0].tolist()
        assert [i for i in range(length) if positions[i] == 0] == sorted(i for i in opened if 0 <= i < length)


def test_attended_length_is_that_of_the_isolated_segments(datasets: list[TokenDataset]) -> None:
    """In rows long enough, each document is a segment of its own length: the end before it for its own end."""
    whole = Sequential(datasets[1], sequence_length=datasets[1].tokens - 1, batch_size=1).batch(0)
    segments = whole.context.documents_BS[0].bincount().double()
    mean = float((segments**2).sum() / segments.sum())
    assert datasets[1].attended_length(10**6) == pytest.approx(mean, rel=0.01)


def test_an_epoch_is_every_row_once_and_the_next_one_another_order(datasets: list[TokenDataset]) -> None:
    rows = datasets[1].rows(S)
    one = Loader(datasets[1:], sequence_length=S, batch_size=rows, seed=1)
    first, second = one.batch(0).tokens_BS.tolist(), one.batch(1).tokens_BS.tolist()
    whole = stream(datasets[1])
    assert sorted(first) == sorted(second) == sorted(whole[i : i + S] for i in range(0, rows * S, S))
    assert first != second
    assert first != Loader(datasets[1:], sequence_length=S, batch_size=rows, seed=2).batch(0).tokens_BS.tolist()


def test_sources_come_in_proportion(datasets: list[TokenDataset]) -> None:
    sources = torch.cat([loader(datasets).batch(step).sources_B for step in range(5)])
    assert sources.bincount().tolist() == [30, 90]
    by_tokens = Loader(datasets, sequence_length=S, batch_size=1000).batch(0).sources_B.bincount()
    share = datasets[0].tokens / (datasets[0].tokens + datasets[1].tokens)
    assert abs(by_tokens[0] - 1000 * share) <= 1.01


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=st.integers(0, 10**9), micro=st.integers(1, 9), world=st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_ranks_and_micro_batches_only_divide_the_rows(
    datasets: list[TokenDataset], step: int, micro: int, world: int
) -> None:
    whole = loader(datasets).batch(step)
    assert whole.samples_B.tolist() == list(range(24 * step, 24 * step + 24))
    ranks = [loader(datasets, rank=rank, world=world) for rank in range(world)]
    parts = [batch for rank in ranks for batch in rank.micro_batches(step, micro)]
    assert torch.cat([part.tokens_BS for part in parts]).equal(whole.tokens_BS)
    assert torch.cat([part.targets_BS for part in parts]).equal(whole.targets_BS)
    assert torch.cat([part.samples_B for part in parts]).equal(whole.samples_B)
    assert sum(part.valid_tokens for part in parts) == whole.valid_tokens
    for part in parts:
        check_against_naive(part, datasets)


def test_stopped_on_eight_ranks_and_resumed_on_three(datasets: list[TokenDataset]) -> None:
    """The global batches are those of one process that never stopped."""
    unbroken = loader(datasets)
    seen = []
    eight = [loader(datasets, rank=rank, world=8) for rank in range(8)]
    for step in range(4):
        seen.append(torch.cat([rank.batch(step).tokens_BS for rank in eight]))
    saved = json.dumps(eight[3].state(4))

    three = [loader(datasets, rank=rank, world=3) for rank in range(3)]
    starts = {rank.resume(json.loads(saved)) for rank in three}
    assert starts == {4}
    iterators = [rank.iterate(4, 7) for rank in three]
    for parts in zip(*iterators, strict=True):
        seen.append(torch.cat([part.tokens_BS for part in parts]))
    assert len(seen) == 7
    for step, tokens_BS in enumerate(seen):
        assert tokens_BS.equal(unbroken.batch(step).tokens_BS)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"seed": 6}, "seed"), ({"weights": [1.0, 2.0]}, "shares"), ({"sequence_length": 8}, "sequence_length")],
)
def test_resuming_with_another_order_is_refused(datasets: list[TokenDataset], change: dict, key: str) -> None:
    with pytest.raises(DataError, match=rf"data\.{key}: .*start a new run"):
        loader(datasets, **change).resume(loader(datasets).state(3))


def test_a_state_from_before_the_samples_changed_is_refused(datasets: list[TokenDataset]) -> None:
    state = loader(datasets).state(3)
    del state["fingerprint"]["version"]
    with pytest.raises(DataError, match=r"data\.version: .*start a new run"):
        loader(datasets).resume(state)


def test_resuming_on_other_data_is_refused(datasets: list[TokenDataset], tmp_path: Path) -> None:
    changed = written(tmp_path / "d", documents(shape(3, 90, 30)))
    with pytest.raises(DataError, match=r"data\.datasets"):
        loader([datasets[0], changed]).resume(loader(datasets).state(3))


def test_another_batch_size_goes_on_at_the_same_sample_or_not_at_all(datasets: list[TokenDataset]) -> None:
    state = loader(datasets).state(3)
    smaller = loader(datasets, batch_size=12)
    assert smaller.batch(smaller.resume(state)).samples_B[0] == 72
    with pytest.raises(DataError, match="divides 72"):
        loader(datasets, batch_size=10).resume(state)


def test_impossible_loaders_are_refused(datasets: list[TokenDataset]) -> None:
    with pytest.raises(ConfigError, match="24 rows cannot be shared out equally to 5 ranks"):
        loader(datasets, world=5)
    with pytest.raises(DataError, match="less than one row of sequence_length"):
        loader(datasets, sequence_length=10_000)
    with pytest.raises(ConfigError, match="one for each of the 2"):
        loader(datasets, weights=[1.0])


@pytest.mark.parametrize(("documents", "size"), [(1, 64), (63, 64), (64, 128), (127, 128), (128, 256), (1000, 1024)])
def test_room_for_boundaries_grows_by_doubling(documents: int, size: int) -> None:
    assert boundaries(documents) == size >= documents + 1


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_covers_everything_once(datasets: list[TokenDataset], world: int, isolate: bool) -> None:
    whole = stream(datasets[1])
    for length in (S, 7, len(whole) - 1, len(whole), 5000):
        ranks = [
            Sequential(
                datasets[1],
                sequence_length=length,
                batch_size=3,
                rank=rank,
                world=world,
                isolate_documents=isolate,
            )
            for rank in range(world)
        ]
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        inputs = torch.cat([batch.tokens_BS for batch in batches]).flatten().tolist()[: len(whole) - 1]
        targets = torch.cat([batch.targets_BS for batch in batches]).flatten().tolist()
        assert inputs == whole[:-1]
        assert targets == whole[1:] + [-100] * (len(targets) - len(whole) + 1)
        assert sum(batch.valid_tokens for batch in batches) == len(whole) - 1


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("kind", [TokenDataset, Unended])
def test_predicted_bytes_are_those_of_the_targets(kind: type[TokenDataset], isolate: bool) -> None:
    token_bytes = np.random.default_rng(0).integers(0, 9, 60_000).astype(np.int32)
    tokens = np.random.default_rng(1).integers(0, 4, 200).tolist()
    dataset = in_memory(kind, tokens, [0, 30, 30, 31, 90, 91, 150, 200])
    held = Sequential(dataset, sequence_length=S, batch_size=2, isolate_documents=isolate)
    targets = torch.cat([batch.targets_BS.flatten() for batch in held])
    assert held.predicted_bytes(token_bytes) == token_bytes[targets[targets != -100].numpy()].sum()


def test_predicted_bytes_prefer_the_bytes_of_the_text(datasets: list[TokenDataset]) -> None:
    held = Sequential(datasets[0], sequence_length=S, batch_size=2)
    first = datasets[0].document(0)[0]
    token_bytes = np.full(60_000, 7, np.int32)
    token_bytes[first] = 3
    assert held.bytes == 2 * datasets[0].tokens
    assert held.predicted_bytes(token_bytes) == held.bytes - 3


@pytest.mark.parametrize(
    ("vocab_size", "facts", "message"),
    [
        (20, {}, "its largest token id is 20, but model.vocab_size is 20; set model.vocab_size to at least 21"),
        (30, {"vocab_size": 31}, "its vocabulary has 31 tokens, but model.vocab_size is 30"),
        (21, {}, None),
        (31, {"vocab_size": 31}, None),
    ],
)
def test_a_vocabulary_larger_than_the_models_is_refused(vocab_size: int, facts: dict, message: str | None) -> None:
    dataset = in_memory(TokenDataset, list(range(1, 21)), [0, 20], **facts)
    with pytest.raises(ConfigError, match=f"memory: {message}") if message else nullcontext():
        check_vocabulary([dataset], vocab_size)


def test_a_batch_moves_as_a_whole(datasets: list[TokenDataset]) -> None:
    batch = loader(datasets).batch(0)
    moved = batch.to("meta")
    assert moved.tokens_BS.is_meta
    assert moved.targets_BS.is_meta
    assert moved.context.positions_BS.is_meta
    assert moved.context.cumulative_lengths_N.is_meta
    assert moved.valid_tokens == batch.valid_tokens
    assert moved.samples_B.device.type == "cpu"


def alive() -> int:
    return sum(thread.name.startswith("treadle-prefetch") for thread in threading.enumerate())


def wait_until_none_is_alive() -> None:
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive() == 0


def test_prefetch_gives_the_items_in_order_and_ends() -> None:
    assert list(Prefetch(lambda i: i * i, 3, 9, depth=3)) == [9, 16, 25, 36, 49, 64]
    wait_until_none_is_alive()


def test_prefetch_works_ahead_but_no_further_than_its_depth() -> None:
    made: list[int] = []
    with Prefetch(lambda i: made.append(i) or i, depth=3) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [0, 1, 2, 3, 4]  # one taken, three waiting, one in hand
    wait_until_none_is_alive()


def test_prefetch_raises_the_error_where_it_belongs() -> None:
    def make(i: int) -> int:
        if i == 2:
            raise DataError("row 2 is damaged")
        return i

    items = Prefetch(make, depth=4)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match="row 2 is damaged"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    wait_until_none_is_alive()


def test_a_forgotten_prefetch_stops() -> None:
    items = Prefetch(lambda i: i)
    assert next(items) == 0
    del items
    gc.collect()
    wait_until_none_is_alive()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_ahead_are_pinned_and_arrive_whole(datasets: list[TokenDataset]) -> None:
    with loader(datasets).iterate(3, 5) as batches:
        for step, batch in enumerate(batches, start=3):
            assert batch.tokens_BS.is_pinned()
            assert batch.context.positions_BS.is_pinned()
            moved, expected = batch.to("cuda", non_blocking=True), loader(datasets).batch(step)
            torch.cuda.synchronize()
            assert moved.targets_BS.cpu().equal(expected.targets_BS)
            assert moved.context.cumulative_lengths_N.cpu().equal(expected.context.cumulative_lengths_N)
