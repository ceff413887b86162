"""Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318): somebody cheap
guesses the next tokens, and the model reads all of them in one step and keeps those that it would have drawn itself.

There is no rejection sampling here, and none is needed. What the model draws at a position depends on the scores there
and on noise that is a hash of seed, position and token, so that the draw at each position is a fact. A guess is kept if
and only if it equals the draw. So the text is that of the same request without speculation, token for token, greedy or
sampled, with whatever filters; its distribution is exact for the same reason. A draft model that draws with the same
noise agrees often, as its scores are similar, and no draft changes the text (Daliri et al. 2024, arXiv:2408.07978).

The one exception is rounding: a matrix product of several rows may round otherwise than that of one.
"""

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

from treadle.errors import ConfigError
from treadle.inference.request import Request
from treadle.inference.runner import Runner, Storage, is_recurrent, windows_of
from treadle.inference.sampler import penalised
from treadle.inference.scheduler import Work
from treadle.inference.states import Taps
from treadle.inference.tables import Tables
from treadle.nn.transformer import Transformer

LONGEST, SHORTEST = 4, 2  # tokens that are looked up
SIZE = 4  # bytes of a token


class Proposer(Protocol):
    """Guesses what follows the tokens of requests, all of which are known."""

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        """At most limits[i] tokens for requests[i]."""
        ...

    def forget(self, request: Request) -> None:
        """It has ended."""
        ...


class Speculation:
    """Who may guess how much, and how often it was right: of `proposed` tokens, `accepted`."""

    def __init__(self, proposer: Proposer, most: int):
        self.proposer, self.most = proposer, most
        self.proposed = self.accepted = 0

    def drafts(self, requests: Sequence[Request], room: int) -> dict[Request, list[int]]:
        """Guesses for requests that lack one token each; together not more than `room`.

        Not for those whose next scores depend on the tokens drawn before in other ways than through the model.
        """
        asked, limits = [], []
        for request in requests:
            left = request.sampling.max_tokens - len(request.outputs) - 1  # that many more than the one drawn anyway
            limit = min(self.most, left, room)
            if limit > 0 and request.matcher is None and not penalised(request.sampling):
                asked.append(request)
                limits.append(limit)
                room -= limit
        return dict(zip(asked, self.proposer.propose(asked, limits), strict=True)) if asked else {}

    def accept(self, draft: Sequence[int], drawn: Sequence[int]) -> int:
        """How many of the guesses are what was drawn in their places."""
        agreed = _agreed(draft, drawn)
        self.proposed += len(draft)
        self.accepted += agreed
        return agreed


class Lookup:
    """Guesses that what followed the last few tokens before will follow them again (prompt lookup, Saxena 2023)."""

    def __init__(self) -> None:
        self._texts: dict[Request, bytearray] = {}  # of tokens as numbers of 4 bytes, which are searched fast

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        return [self._propose(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def _propose(self, request: Request, limit: int) -> list[int]:
        text = self._texts.setdefault(request, bytearray(array("i", request.prompt).tobytes()))
        text += array("i", request.outputs[len(text) // SIZE - len(request.prompt) :]).tobytes()
        tokens = len(text) // SIZE
        for size in range(min(LONGEST, tokens - 1), SHORTEST - 1, -1):
            if (place := self._before(text, size)) is not None:
                found = array("i", text[place * SIZE : (place + limit) * SIZE]).tolist()
                while len(found) < limit:  # a repetition goes on into what is guessed
                    found.append(found[place - tokens + len(found)])
                return found
        return []

    @staticmethod
    def _before(text: bytearray, size: int) -> int | None:
        """The place after the last time that the text's last `size` tokens came before."""
        tail, end = text[-size * SIZE :], len(text) - SIZE
        while (at := text.rfind(tail, 0, end)) >= 0:
            if at % SIZE == 0:
                return at // SIZE + size
            end = at + len(tail) - 1
        return None

    def forget(self, request: Request) -> None:
        self._texts.pop(request, None)


class Draft:
    """Guesses what a smaller model of the same vocabulary draws with the same noise. It has pages of its own."""

    def __init__(self, model: Transformer, target: Runner, *, page: int, tokens: int, budget: int, backend: str):
        """tokens: in its cache. Raises ConfigError for a model that cannot take tokens back, or knows other tokens."""
        if is_recurrent(model):
            raise ConfigError("draft: the model keeps a state and cannot take tokens back; use one of attention only")
        if (model.config.vocab_size or 0) > target.sampler.vocabulary:
            raise ConfigError(
                f"draft: its vocabulary of {model.config.vocab_size} is larger than the model's "
                f"{target.sampler.vocabulary}; both have to have the same tokenizer"
            )
        windows = windows_of(model)
        counts = [-(-tokens // page) for _ in windows]
        self.tables = Tables(windows, counts, page, reuse=False)
        self.storage = Storage(model.eval(), windows, counts, page, target.sampler.slots)
        self.runner = Runner(model, self.tables, self.storage, Taps(model, budget), target.sampler.slots, backend)
        self.budget, self.longest, self._target = budget, model.config.max_length, target
        self._shadows: dict[Request, Request] = {}

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        shadows = [self._shadow(request) for request in requests]
        limited = [(shadow, limit) for shadow, limit in zip(shadows, limits, strict=True) if self._fits(shadow, limit)]
        self._catch_up([shadow for shadow, _ in limited])
        launched = []
        for step in range(max((limit for _, limit in limited), default=0)):
            active = [shadow for shadow, limit in limited if limit > step]
            work = [self._move(shadow, shadow.pending) for shadow in active]
            for shadow in active:
                shadow.in_flight += 1
            launched.append(self.runner.launch(work))
        for drawn in launched:  # the device has drawn each from the one before, without waiting for the host
            drawn.arrived()
            for shadow, token in zip(drawn.requests, drawn.sampled.tokens_R.tolist(), strict=True):
                shadow.outputs.append(token)
                shadow.in_flight -= 1
        return [shadow.outputs for shadow in shadows]

    def _shadow(self, request: Request) -> Request:
        """The request as this model has it: all tokens are its prompt; those before a wrong guess are computed."""
        tokens, shadow = [*request.prompt, *request.outputs], self._shadows.get(request)
        if shadow is None:
            nothing = {"logprobs": None, "prompt_logprobs": False, "min_tokens": 0}
            sampling = request.sampling.model_copy(update={**nothing, "seed": self._target.sampler.seed(request)})
            shadow = self._shadows[request] = Request(tokens, sampling)
            self.tables.adopt(shadow)
        right = len(shadow.prompt) + _agreed(shadow.outputs, tokens[len(shadow.prompt) :])
        shadow.computed = min(shadow.computed, right, len(tokens) - 1)
        shadow.prompt, shadow.outputs, shadow.slot = tokens, [], request.slot
        return shadow

    def _fits(self, shadow: Request, limit: int) -> bool:
        """Pages for all of it at once: letting go of those that windows have left, when nothing can be taken back."""
        length = len(shadow.prompt) + limit
        return length <= self.longest and self.tables.grow(shadow, length)

    def _catch_up(self, shadows: Sequence[Request]) -> None:
        """Read what is too much for one step, all but the last token of each."""
        while sum(shadow.pending for shadow in shadows) > self.budget:
            work, room = [], self.budget
            for shadow in shadows:
                if (size := min(shadow.pending - 1, room)) > 0:
                    work.append(self._move(shadow, size))
                    room -= size
            self.runner.launch(work)

    @staticmethod
    def _move(shadow: Request, tokens: int) -> Work:
        begin = shadow.computed
        shadow.computed += tokens
        return Work(shadow, begin, shadow.computed, samples=shadow.computed == shadow.length)

    def forget(self, request: Request) -> None:
        if (shadow := self._shadows.pop(request, None)) is not None:
            self.tables.release(shadow)


def _agreed(guesses: Sequence[int], tokens: Sequence[int]) -> int:
    """How many of them are the same, from the first one on."""
    pairs = enumerate(zip(guesses, tokens, strict=False))
    return next((place for place, (guess, token) in pairs if guess != token), min(len(guesses), len(tokens)))


def speculation_of(
    config: Any, model: Transformer, draft: Transformer | None, runner: Runner, tokens: int
) -> Speculation | None:
    """What an engine's configuration asks for; None if nothing. Raises ConfigError for what cannot be."""
    if not config.speculate:
        if draft is not None:
            raise ConfigError("speculate: 0 with a draft model; set how many tokens it guesses, such as speculate=4")
        return None
    if is_recurrent(model):
        raise ConfigError("speculate: the model keeps a state and cannot take tokens back; set speculate=0")
    if draft is None:
        return Speculation(Lookup(), config.speculate)
    options = {"page": config.page, "tokens": tokens, "budget": config.budget, "backend": config.backend}
    return Speculation(Draft(draft, runner, **options), config.speculate)
