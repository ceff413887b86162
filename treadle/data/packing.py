"""Rows of a token stream as a batch that a model can train on.

A row is S + 1 consecutive tokens of the stream: S inputs, and the S targets one further on. B rows, S sequence.

Where documents are isolated, the end-of-text token that ends one is the first input of the next: it is never predicted
from, otherwise, and a sample without a prompt starts from it. So every token but the stream's first is a target.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from treadle.attention.context import AttentionContext
from treadle.data.dataset import TokenDataset
from treadle.kernels.linear_cross_entropy import IGNORED

LEAST_BOUNDARIES = 64


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    tokens_BS, targets_BS: int64; a target of -100 is not to be predicted. valid_tokens: how many targets are.
    sources_B: int64, which dataset a row is from; samples_B: int64, its global sample index (both stay on the CPU).
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    context: AttentionContext
    valid_tokens: int
    sources_B: Tensor
    samples_B: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return replace(
            self,
            tokens_BS=self.tokens_BS.to(device, non_blocking=non_blocking),
            targets_BS=self.targets_BS.to(device, non_blocking=non_blocking),
            context=self.context.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """In page-locked memory, so that `to(device, non_blocking=True)` does not wait."""
        return replace(
            self,
            tokens_BS=self.tokens_BS.pin_memory(),
            targets_BS=self.targets_BS.pin_memory(),
            context=self.context.map(lambda tensor: tensor.contiguous().pin_memory()),
        )


def boundaries(documents: int) -> int:
    """Room for the boundaries of so many documents: a power of two, so that shapes seldom change."""
    return max(LEAST_BOUNDARIES, 1 << documents.bit_length())


class Rows:
    """A batch in the making. Each row has to be filled once, or left empty."""

    def __init__(self, batch: int, sequence_length: int, isolate_documents: bool):
        self.tokens_BS = np.empty((batch, sequence_length), dtype=np.int64)
        self.targets_BS = np.empty((batch, sequence_length), dtype=np.int64)
        self.begins_BS = np.zeros((batch, sequence_length), dtype=bool) if isolate_documents else None
        self.valid = 0
        self.documents = batch

    def fill(self, row: int, dataset: TokenDataset, start: int) -> None:
        """Row `row` becomes the tokens from `start` on, then nothing if the stream ends before the row does."""
        length = min(self.tokens_BS.shape[1], dataset.tokens - 1 - start)
        begins = dataset.read(start, self.tokens_BS[row, :length], self.targets_BS[row, :length])
        self.leave_empty(row, length)
        self.valid += length
        if self.begins_BS is not None and begins:
            first = np.unique(begins)  # an empty document begins where the next one does
            shared = dataset.ended(self.tokens_BS[row, first - 1])
            # The last word of a document that has no end-of-text token says nothing about the next document.
            self.targets_BS[row, first[~shared] - 1] = IGNORED
            self.valid -= int((~shared).sum())
            first = first - shared
            inside = first[(first > 0) & (first < self.tokens_BS.shape[1])]
            self.begins_BS[row, inside] = True
            self.documents += len(inside)

    def leave_empty(self, row: int, start: int = 0) -> None:
        """Nothing to predict in row `row` from `start` on."""
        self.tokens_BS[row, start:] = 0
        self.targets_BS[row, start:] = IGNORED

    def batch(self, sources_B: np.ndarray, samples_B: np.ndarray) -> Batch:
        """sources_B, samples_B: int64, where the rows are from."""
        B, S = self.tokens_BS.shape
        if self.begins_BS is None:
            context = AttentionContext.causal(B, S)
        else:
            documents_BS = torch.from_numpy(np.cumsum(self.begins_BS, axis=1, dtype=np.int32))
            context = AttentionContext.packed(documents_BS, boundaries=boundaries(self.documents))
        tokens_BS, targets_BS = torch.from_numpy(self.tokens_BS), torch.from_numpy(self.targets_BS)
        places = torch.from_numpy(sources_B), torch.from_numpy(samples_B)
        return Batch(tokens_BS, targets_BS, context, self.valid, *places)
