"""Tokens from scores: penalties, temperature, filters, and a draw that depends on nothing but the request itself.

See `treadle.kernels.draw` for the draw: a seed gives the same text in any batch, on any device, at any time.

R requests, S slots, V vocabulary.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from treadle import kernels
from treadle.inference.constrained import constrained
from treadle.inference.request import Logprob, Request, Sampling
from treadle.kernels.draw import gumbel

NEVER = float("-inf")
ALWAYS_RARE = 1 << 62


@dataclass(frozen=True)
class Sampled:
    """What was drawn, all of the model's own distribution: at temperature 1, before anything is done to the scores.

    logprobs_R: of the tokens. top_RN, top_logprobs_RN: the likeliest, as many as the most curious request asks for.
    """

    tokens_R: Tensor
    logprobs_R: Tensor
    top_RN: Tensor | None = None
    top_logprobs_RN: Tensor | None = None

    @classmethod
    def cat(cls, parts: "Sequence[Sampled]") -> "Sampled":
        """One after the other; all have as many of the likeliest."""
        columns = [[getattr(part, f.name) for part in parts] for f in fields(cls)]
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def token(self, row: int, most: int | None) -> Logprob:
        """Of one row, with the `most` likeliest."""
        top: dict[int, float] = {}
        if most and self.top_RN is not None and self.top_logprobs_RN is not None:
            top = dict(zip(self.top_RN[row, :most].tolist(), self.top_logprobs_RN[row, :most].tolist(), strict=True))
        return Logprob(int(self.tokens_R[row]), float(self.logprobs_R[row]), top)

    def to_host(self) -> "Sampled":
        """Copies in pinned memory, on their way."""
        columns = [getattr(self, f.name) for f in fields(self)]
        return Sampled(*(None if x is None else to_host(x) for x in columns))  # type: ignore[arg-type]


def to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory, on its way."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def described(logits_RV: Tensor, tokens_R: Tensor, most: int) -> Sampled:
    """What the model thinks of tokens, and of the `most` likeliest.  logits_RV: float32."""
    norm_R1 = logits_RV.logsumexp(-1, keepdim=True)
    logprobs_R = (logits_RV.gather(1, tokens_R[:, None]) - norm_R1)[:, 0]
    if not most:
        return Sampled(tokens_R, logprobs_R)
    top = logits_RV.topk(min(most, logits_RV.shape[-1]), dim=-1)
    return Sampled(tokens_R, logprobs_R, top.indices, top.values - norm_R1)


def plain_from(request: Request) -> int:
    """The position from which on a request's tokens are drawn from its scores as they are, by temperature alone."""
    asked = request.sampling
    filtered = asked.top_k or asked.top_p < 1 or asked.min_p > 0
    if filtered or penalised(asked) or asked.logit_bias or asked.logprobs or request.matcher is not None:
        return ALWAYS_RARE
    return len(request.prompt) + asked.min_tokens if asked.min_tokens and request.ends else 0


class Sampler:
    """Draws for requests in slots. `latest_S` is each slot's last token, which the next step reads on the device."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device):
        self.slots, self.vocabulary, self.device = slots, vocabulary, device
        self.latest_S = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        # How often each token was generated, and which occurred at all: kept only once a request asks for penalties.
        self._counts_SV: Tensor | None = None
        self._seen_SV: Tensor | None = None
        self._counted: dict[int, Any] = {}  # whose: the `pages`, another list each time that a request begins
        self._salt = secrets.randbits(62)  # what is asked for without a seed differs from process to process

    def draw(self, logits_RV: Tensor, requests: Sequence[Request]) -> Sampled:
        """The next token of each request.  logits_RV: any float dtype; not changed."""
        slots_R = self._tensor([request.place for request in requests], torch.int64)
        asked = [request.sampling for request in requests]
        if any(sampling.temperature for sampling in asked) and all(map(_is_plain, requests)):
            temperatures_R = self._tensor([sampling.temperature for sampling in asked])
            tokens_R, logprobs_R = kernels.draw(logits_RV, temperatures_R, *self._seeds(requests))
            self.latest_S[slots_R] = tokens_R
            return Sampled(tokens_R, logprobs_R)
        logits_RV = logits_RV.float()
        scores_RV = constrained(self._shifted(logits_RV, requests, slots_R), requests)
        tokens_R = self._choose(scores_RV, requests, asked)
        self.latest_S[slots_R] = tokens_R
        if self._counts_SV is not None and self._seen_SV is not None:
            self._counts_SV[slots_R, tokens_R] += 1
            self._seen_SV[slots_R, tokens_R] = True
        return described(logits_RV, tokens_R, max((sampling.logprobs or 0 for sampling in asked), default=0))

    def _choose(self, scores_RV: Tensor, requests: Sequence[Request], asked: Sequence[Sampling]) -> Tensor:
        if all(sampling.temperature == 0 for sampling in asked):
            return scores_RV.argmax(-1)
        temperature_R1 = self._tensor([sampling.temperature or 1.0 for sampling in asked])[:, None]
        filtered_RV = _filter(self, scores_RV / temperature_R1, asked)
        greedy_R = self._tensor([sampling.temperature == 0 for sampling in asked], torch.bool)
        noisy_RV = filtered_RV + gumbel(*self._seeds(requests), self.vocabulary)
        # Filtering and noise leave the greedy rows alone.
        return torch.where(greedy_R[:, None], scores_RV, noisy_RV).argmax(-1)

    def _shifted(self, logits_RV: Tensor, requests: Sequence[Request], slots_R: Tensor) -> Tensor:
        """The scores after what the request says about single tokens: penalties, bias, and ends that come too early."""
        wanted = [penalised(request.sampling) for request in requests]
        if any(wanted):
            logits_RV = self._penalise(logits_RV, requests, wanted, slots_R)
        rows: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        for row, request in enumerate(requests):
            changes = dict(request.sampling.logit_bias)
            if len(request.outputs) + request.in_flight <= request.sampling.min_tokens:  # in flight is this one
                changes |= dict.fromkeys(request.ends, NEVER)
            rows += [row] * len(changes)
            tokens += changes.keys()
            values += changes.values()
        if rows:
            index = self._tensor(rows, torch.int64), self._tensor(tokens, torch.int64)
            logits_RV = logits_RV.index_put(index, self._tensor(values), accumulate=True)
        return logits_RV

    def _penalise(
        self, logits_RV: Tensor, requests: Sequence[Request], wanted: Sequence[bool], slots_R: Tensor
    ) -> Tensor:
        counts_SV, seen_SV = self._tallies()
        for request, one in zip(requests, wanted, strict=True):
            slot = request.place
            if one and self._counted.get(slot) is not request.pages:
                self._count(request, counts_SV[slot], seen_SV[slot])
                self._counted[slot] = request.pages
        repetition_R1, presence_R1, frequency_R1 = (
            self._tensor([getattr(request.sampling, f"{name}_penalty") for request in requests])[:, None]
            for name in ("repetition", "presence", "frequency")
        )
        shrunk_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
        logits_RV = torch.where(seen_SV[slots_R], shrunk_RV, logits_RV)
        counts_RV = counts_SV[slots_R]
        return logits_RV - presence_R1 * (counts_RV > 0) - frequency_R1 * counts_RV

    def _tallies(self) -> tuple[Tensor, Tensor]:
        if self._counts_SV is None or self._seen_SV is None:
            shape = self.slots + 1, self.vocabulary
            self._counts_SV = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._seen_SV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return self._counts_SV, self._seen_SV

    def _count(self, request: Request, counts_V: Tensor, seen_V: Tensor) -> None:
        """Begin to count a request that is new in its slot: all its tokens are known here, none is in flight."""
        prompt, outputs = (self._tensor(tokens, torch.int64) for tokens in (request.prompt, request.outputs))
        counts_V.zero_().index_add_(0, outputs, torch.ones_like(outputs, dtype=counts_V.dtype))
        seen_V.zero_()
        seen_V[prompt] = True
        seen_V[outputs] = True

    def _seeds(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """And the positions of the tokens that are drawn.  -> seeds_R, positions_R"""
        seeds_R = self._tensor([self.seed(request) for request in requests], torch.int64)
        return seeds_R, self._tensor([request.length - 1 for request in requests], torch.int64)

    def seed(self, request: Request) -> int:
        seed = self._salt ^ request.number if request.sampling.seed is None else request.sampling.seed
        return (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # any integer, as one of 64 bits

    def _tensor(self, values: Sequence[object], dtype: torch.dtype = torch.float32) -> Tensor:
        host = torch.tensor(values, dtype=dtype)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)


def _filter(sampler: Sampler, scores_RV: Tensor, asked: Sequence[Sampling]) -> Tensor:
    """-inf for what top-k, top-p and min-p leave out, in this order; each sees what the one before has kept."""
    if any(sampling.min_p > 0 for sampling in asked):
        floor_R1 = sampler._tensor([sampling.min_p for sampling in asked])[:, None].log()
        scores_RV = scores_RV.masked_fill(scores_RV < scores_RV.amax(-1, keepdim=True) + floor_R1, NEVER)
    if all(sampling.top_k is None and sampling.top_p == 1.0 for sampling in asked):
        return scores_RV
    V = scores_RV.shape[-1]
    k_R1 = sampler._tensor([min(sampling.top_k or V, V) for sampling in asked], torch.int64)[:, None]
    p_R1 = sampler._tensor([sampling.top_p for sampling in asked])[:, None]
    sorted_RV, order_RV = scores_RV.sort(dim=-1, descending=True)
    rank_V = torch.arange(V, device=scores_RV.device)
    sorted_RV = sorted_RV.masked_fill(rank_V >= k_R1, NEVER)
    share_RV = sorted_RV.softmax(-1)
    # A token stays while those before it have less than top_p together; the likeliest always stays.
    dropped_RV = (share_RV.cumsum(-1) - share_RV >= p_R1) & (p_R1 < 1) & (rank_V > 0)
    return torch.full_like(scores_RV, NEVER).scatter(1, order_RV, sorted_RV.masked_fill(dropped_RV, NEVER))


def _is_plain(request: Request) -> bool:
    return request.length - 1 >= plain_from(request)


def penalised(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
