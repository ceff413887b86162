"""Tokens from scores.

R requests, S slots, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.inference.request import Request


@dataclass(frozen=True)
class Sampled:
    """What was drawn. logprobs_R: of the tokens, at temperature 1, before anything else is done to the scores."""

    tokens_R: Tensor
    logprobs_R: Tensor

    def to_host(self) -> "Sampled":
        """Copies in pinned memory, on their way."""

        def copy(x: Tensor) -> Tensor:
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

        return Sampled(copy(self.tokens_R), copy(self.logprobs_R))


class Sampler:
    """Draws for requests in slots; `latest_S` is each slot's last token."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device):
        self.latest_S = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    def draw(self, logits_RV: Tensor, requests: Sequence[Request]) -> Sampled:
        logits_RV = logits_RV.float()
        tokens_R = logits_RV.argmax(-1)
        logprobs_R = logits_RV.log_softmax(-1).gather(1, tokens_R[:, None])[:, 0]
        slots_R = torch.tensor([request.slot for request in requests], dtype=torch.int64, device=logits_RV.device)
        self.latest_S[slots_R] = tokens_R
        return Sampled(tokens_R, logprobs_R)
