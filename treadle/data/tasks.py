"""Tasks whose rows are made, not read: sample g is a function of the seed and g, so any split and resume is exact.

A task says what a row asks and what the answers are. A target that is no answer is -100: it is neither trained on nor
counted. B rows, S sequence, P key-value pairs, N random numbers of a row.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from treadle.attention.context import AttentionContext
from treadle.config import Kind, key_error
from treadle.data.batches import Batches
from treadle.data.packing import Batch
from treadle.data.permutation import mix
from treadle.kernels.linear_cross_entropy import IGNORED

VERSION = 1  # of what the samples of the same task and seed are
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Random numbers by sample number. Draws of another seed, or of held-out samples, are unrelated."""

    def __init__(self, seed: int, held_out: bool = False):
        self.state = mix(mix(np.array([seed], dtype=np.uint64) + GOLDEN) + np.array([held_out], dtype=np.uint64))

    def uniform(self, samples_B: np.ndarray, count: int) -> np.ndarray:
        """`count` numbers of each sample.  int64 [B] -> float64 [B, count] in [0, 1)"""
        key_B1 = mix(self.state ^ mix(samples_B.astype(np.uint64) + GOLDEN))[:, None]
        bits_BN = mix(key_B1 + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)
        return (bits_BN >> np.uint64(11)) * 2.0**-53


class TaskConfig(Kind):
    """What the rows of a task are."""

    vocab_size: PositiveInt = Field(8192, description="tokens that the task is written in")

    def problems(self, length: int) -> Iterator[tuple[str, str]]:
        """(key, message) for each value that is impossible in rows of `length` tokens."""
        yield from ()

    def parts(self) -> dict[str, "TaskConfig"]:
        """Tasks, by name, whose held-out samples are scored apart."""
        return {"all": self}

    @abstractmethod
    def rows(self, samples_B: np.ndarray, length: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """The rows of these sample numbers, independent of each other.  -> int64 tokens_BS, targets_BS"""


class MQARConfig(TaskConfig):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927).

    A row begins with `pairs` different keys, each followed by its value; values are different too. Then each key comes
    once more, and its value is to be predicted. The place of a query after the pairs follows a power law, as
    repetitions do in text: near places are likelier. Between queries stands token 0, and the answers stand nowhere.
    """

    kind: Literal["mqar"] = "mqar"
    pairs: PositiveInt | list[PositiveInt] = Field(
        description="key-value pairs of a row; of a list each row draws one, and each is scored apart"
    )
    power: PositiveFloat = Field(0.01, description="a of the density gap^(a-1) of query places; 1: all alike")

    @property
    def choices(self) -> list[int]:
        return [self.pairs] if isinstance(self.pairs, int) else self.pairs

    @model_validator(mode="after")
    def _there_is_a_choice(self) -> "MQARConfig":
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise key_error("pairs", f"{self.choices}; expected different numbers, at least one")
        return self

    def problems(self, length: int) -> Iterator[tuple[str, str]]:
        most = max(self.choices)
        if length < 4 * most:
            yield "pairs", f"{most} pairs and as many queries need rows of {4 * most} tokens, not {length}"
        if self.vocab_size // 2 - 1 < most:
            yield "vocab_size", f"{self.vocab_size} has too few keys for {most} pairs; raise it to {2 * most + 2}"

    def parts(self) -> dict[str, TaskConfig]:
        return {f"{count}_pairs": self.model_copy(update={"pairs": count}) for count in self.choices}

    def rows(self, samples_B: np.ndarray, length: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        tokens_BS = np.zeros((len(samples_B), length), dtype=np.int64)
        targets_BS = np.full_like(tokens_BS, IGNORED)
        choice_B = (draws.uniform(samples_B, 1)[:, 0] * len(self.choices)).astype(np.int64)
        for choice, pairs in enumerate(self.choices):
            mine = choice_B == choice
            tokens_BS[mine], targets_BS[mine] = self._rows(samples_B[mine], pairs, length, draws)
        return tokens_BS, targets_BS

    def _rows(self, samples_B: np.ndarray, P: int, length: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Rows of P pairs each."""
        half, slots = self.vocab_size // 2, (length - 2 * P) // 2  # a query may stand at every second token
        u_BN = draws.uniform(samples_B, 1 + 2 * P + slots)[:, 1:]  # the first one has drawn P
        keys_BP = 1 + distinct(u_BN[:, :P], half - 1)
        values_BP = half + distinct(u_BN[:, P : 2 * P], self.vocab_size - half)
        places_BP = 2 * P + 2 * weighted(u_BN[:, 2 * P :], np.arange(1, slots + 1) ** (self.power - 1), P)
        tokens_BS = np.zeros((len(samples_B), length), dtype=np.int64)
        tokens_BS[:, 0 : 2 * P : 2], tokens_BS[:, 1 : 2 * P : 2] = keys_BP, values_BP
        targets_BS = np.full_like(tokens_BS, IGNORED)
        np.put_along_axis(tokens_BS, places_BP, keys_BP, axis=1)
        np.put_along_axis(targets_BS, places_BP, values_BP, axis=1)
        return tokens_BS, targets_BS


def distinct(u_BP: np.ndarray, n: int) -> np.ndarray:
    """P different numbers below n in each row, every choice and order alike.  [0, 1) -> int64 [B, P]

    The first P steps of a Fisher-Yates shuffle, in all rows at once.
    """
    B, P = u_BP.shape
    pool_BN, rows_B = np.tile(np.arange(n, dtype=np.int32), (B, 1)), np.arange(B)
    for i in range(P):
        other_B = i + (u_BP[:, i] * (n - i)).astype(np.int64)
        pool_BN[rows_B, other_B], pool_BN[:, i] = pool_BN[:, i].copy(), pool_BN[rows_B, other_B]
    return pool_BN[:, :P].astype(np.int64)


def weighted(u_BN: np.ndarray, weights_N: np.ndarray, count: int) -> np.ndarray:
    """`count` different indices below N in each row, drawn one after the other in proportion to their weights.

    By sorting u^(1/weight) (Efraimidis and Spirakis 2006).  [0, 1) -> int64 [B, count]
    """
    return np.argsort(-np.log1p(-u_BN) / weights_N, axis=1, kind="stable")[:, :count]


class TaskBatches(Batches):
    """The batches of a task: the training samples, or held-out ones, which are others, and the same for every seed."""

    def __init__(
        self,
        task: TaskConfig,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        held_out: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(batch_size, rank, world)
        self.task, self.sequence_length, self.seed = task, sequence_length, seed
        self.draws = Draws(0 if held_out else seed, held_out)

    def samples(self, start: int, stop: int) -> Batch:
        samples_B = np.arange(start, stop, dtype=np.int64)
        tokens_BS, targets_BS = self.task.rows(samples_B, self.sequence_length, self.draws)
        context = AttentionContext.causal(*tokens_BS.shape)
        valid = int((targets_BS != IGNORED).sum())
        made = (torch.from_numpy(array) for array in (samples_B * 0, samples_B))
        return Batch(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS), context, valid, *made)

    @property
    def fingerprint(self) -> dict[str, Any]:
        task = self.task.model_dump(mode="json")
        return {"version": VERSION, "task": task, "sequence_length": self.sequence_length, "seed": self.seed}
