"""Batches: against a loop that packs naively, on any ranks, from any step, with documents kept apart or not."""

import gc
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_zoo import EOS, documents, shape, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.data.dataset import TokenDataset
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
        if i > 0 and start + i in begins:
            number, position = number + 1, 0
        targets.append(-100 if start + i + 1 in begins else row[i + 1])
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
    assert together.valid_tokens == 24 * S > apart.valid_tokens
    assert (together.targets_BS[:, :-1] == together.tokens_BS[:, 1:]).all()
    assert together.context.documents_BS is None
    assert together.context.positions_BS.tolist() == [list(range(S))] * 24


def test_the_end_of_a_document_is_predicted_but_nothing_from_it(datasets: list[TokenDataset]) -> None:
    batch = loader(datasets).batch(0)
    after_end = batch.targets_BS[batch.tokens_BS == EOS]
    assert (after_end == -100).all()
    assert (batch.targets_BS == EOS).any()
    assert (batch.targets_BS[batch.tokens_BS != EOS] != -100).all()


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
    begins = set(np.cumsum([len(d) for d in datasets[1].each_document()]).tolist())
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
        expected = [-100 if isolate and i in begins else whole[i] for i in range(1, len(whole))]
        assert targets == expected + [-100] * (len(targets) - len(expected))
        assert sum(batch.valid_tokens for batch in batches) == sum(t != -100 for t in expected)


@pytest.mark.parametrize("isolate", [True, False])
def test_predicted_bytes_are_those_of_the_targets(datasets: list[TokenDataset], isolate: bool) -> None:
    token_bytes = np.random.default_rng(0).integers(0, 9, 60_000).astype(np.int32)
    held = Sequential(datasets[0], sequence_length=S, batch_size=2, isolate_documents=isolate)
    targets = torch.cat([batch.targets_BS.flatten() for batch in held])
    assert held.predicted_bytes(token_bytes) == token_bytes[targets[targets != -100].numpy()].sum()
    assert held.bytes == 2 * datasets[0].tokens


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
    return sum(thread.name == "treadle-prefetch" for thread in threading.enumerate())


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
