"""Rows of tasks against their definition, read slowly; and that a sample depends on seed and number alone."""

import itertools

import numpy as np
import pytest
import torch

from treadle.data.tasks import Draws, MQARConfig, TaskBatches, distinct, weighted
from treadle.errors import ConfigError, DataError


def batches(length=64, batch_size=8, seed=0, held_out=False, rank=0, world=1, **task):
    task = MQARConfig(**{"pairs": 5, "vocab_size": 40, **task})
    where = {"rank": rank, "world": world}
    return TaskBatches(task, sequence_length=length, batch_size=batch_size, seed=seed, held_out=held_out, **where)


def check_row(tokens: list[int], targets: list[int], pairs: int, vocabulary: int) -> list[int]:
    """The definition, token by token; the places of the queries."""
    memory = {tokens[2 * i]: tokens[2 * i + 1] for i in range(pairs)}
    assert len(memory) == pairs, "keys are different"
    assert len(set(memory.values())) == pairs, "values are different"
    assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in memory.items())
    assert all(target == -100 for target in targets[: 2 * pairs])
    asked, places = [], []
    for place in range(2 * pairs, len(tokens)):
        if tokens[place] == 0:
            assert targets[place] == -100
        else:
            assert targets[place] == memory[tokens[place]], "the answer is the value that followed the key"
            asked.append(tokens[place])
            places.append(place)
    assert sorted(asked) == sorted(memory), "each key is asked for once"
    assert all((place - 2 * pairs) % 2 == 0 for place in places)
    return places


@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(64, 5, 40), (20, 5, 12), (33, 8, 19), (256, 64, 8192)])
@pytest.mark.parametrize("power", [0.01, 1.0])
def test_rows_are_what_the_paper_defines(length, pairs, vocabulary, power):
    batch = batches(length, 50, pairs=pairs, vocab_size=vocabulary, power=power).batch(3)
    assert batch.tokens_BS.shape == batch.targets_BS.shape == (50, length)
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64
    for tokens, targets in zip(batch.tokens_BS.tolist(), batch.targets_BS.tolist(), strict=True):
        check_row(tokens, targets, pairs, vocabulary)
    assert batch.valid_tokens == 50 * pairs
    assert batch.samples_B.tolist() == list(range(150, 200))
    assert batch.context.documents_BS is None


def test_a_row_draws_its_number_of_pairs():
    batch = batches(40, 3000, pairs=[1, 4, 10]).batch(0)
    counts = (batch.targets_BS != -100).sum(1)
    for tokens, targets, pairs in zip(
        batch.tokens_BS.tolist(), batch.targets_BS.tolist(), counts.tolist(), strict=True
    ):
        check_row(tokens, targets, pairs, 40)
    drawn = np.bincount(counts.numpy())
    assert np.flatnonzero(drawn).tolist() == [1, 4, 10]
    assert drawn[[1, 4, 10]] == pytest.approx(1000, abs=100)
    assert batch.valid_tokens == counts.sum()
    parts = MQARConfig(pairs=[1, 4, 10]).parts()
    assert {name: part.pairs for name, part in parts.items()} == {"1_pairs": 1, "4_pairs": 4, "10_pairs": 10}


def test_places_follow_the_power_law():
    """The first of one pair's places has probability gap^(a-1) / sum: counted over many rows."""
    for power in (0.01, 1.0):
        batch = batches(42, 20_000, pairs=1, power=power).batch(0)
        slots = (batch.targets_BS != -100).int().argmax(1).numpy() // 2 - 1
        density = np.arange(1.0, 21.0) ** (power - 1)
        expected = 20_000 * density / density.sum()
        found = np.bincount(slots, minlength=20)
        assert ((found - expected) ** 2 / expected).sum() < 43.8  # chi-squared of 19, p = 0.001


def test_weighted_draws_are_draws_one_after_the_other():
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    p = weights / weights.sum()
    drawn = weighted(Draws(0).uniform(np.arange(40_000), 4), weights, 2)
    assert drawn.shape == (40_000, 2)
    for first, second in itertools.permutations(range(4), 2):
        expected = p[first] * p[second] / (1 - p[first])
        found = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).mean()
        assert found == pytest.approx(expected, abs=5 * np.sqrt(expected / 40_000))


def test_distinct_numbers_come_in_every_order_alike():
    drawn = distinct(Draws(1).uniform(np.arange(24_000), 3), 4)
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == sorted(itertools.permutations(range(4), 3))
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 49.7  # chi-squared of 23, p = 0.001


def test_uniform_numbers_are_uniform_and_unrelated():
    for draws in (Draws(0), Draws(0, held_out=True), Draws(2**63)):
        u = draws.uniform(np.arange(1000), 64)
        assert u.min() >= 0
        assert u.max() < 1
        assert u.mean() == pytest.approx(0.5, abs=0.006)
        assert u.var() == pytest.approx(1 / 12, abs=0.003)
        neighbours = np.corrcoef(np.stack((u[:-1, :-1].ravel(), u[1:, :-1].ravel(), u[:-1, 1:].ravel())))
        assert abs(neighbours - np.eye(3)).max() < 0.02


def test_any_split_gives_the_same_samples():
    whole = batches().samples(0, 48)
    alone = [batches().samples(number, number + 1) for number in range(48)]
    ranks = [batches(rank=rank, world=4).batch(step) for step in range(6) for rank in range(4)]
    micro = [part for step in range(6) for part in batches().micro_batches(step, 3)]
    with batches().iterate(0, 6) as ahead:
        prefetched = list(ahead)
    for parts in (alone, ranks, micro, prefetched):
        assert torch.equal(torch.cat([part.tokens_BS for part in parts]), whole.tokens_BS)
        assert torch.equal(torch.cat([part.targets_BS for part in parts]), whole.targets_BS)
        assert torch.cat([part.samples_B for part in parts]).tolist() == list(range(48))


def test_held_out_rows_are_the_same_for_every_seed():
    first, second = (batches(seed=seed, held_out=True).samples(5, 60) for seed in (0, 7))
    assert torch.equal(first.tokens_BS, second.tokens_BS)
    assert torch.equal(first.targets_BS, second.targets_BS)


def test_other_seeds_and_held_out_samples_are_other_samples():
    rows = [batches(seed=seed, held_out=held_out).samples(0, 200) for seed, held_out in [(0, 0), (1, 0), (0, 1)]]
    seen = {tuple(row) for batch in rows for row in batch.tokens_BS.tolist()}
    assert len(seen) == 600


def test_state_goes_on_and_refuses_another_task():
    state = batches().state(7)
    assert batches().resume(state) == 7
    assert batches(batch_size=4).resume(state) == 14
    with pytest.raises(DataError, match=r"data\.task: the run was stopped with sha256"):
        batches(pairs=6).resume(state)
    with pytest.raises(DataError, match=r"data\.seed: the run was stopped with 0 and is resumed with 3"):
        batches(seed=3).resume(state)
    with pytest.raises(ConfigError, match="batch_size: 8 rows cannot be shared out equally to 3 ranks"):
        batches(world=3)


def test_problems():
    assert list(MQARConfig(pairs=16).problems(64)) == []
    ((key, message),) = MQARConfig(pairs=17).problems(64)
    assert (key, message) == ("pairs", "17 pairs and as many queries need rows of 68 tokens, not 64")
    assert list(MQARConfig(pairs=4, vocab_size=10).problems(64)) == []
    ((key, message),) = MQARConfig(pairs=4, vocab_size=9).problems(64)
    assert (key, message) == ("vocab_size", "9 has too few keys for 4 pairs; raise it to 10")
