"""A request: a prompt, how to go on from it, and how far it is."""

import itertools
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from treadle.config import Config

FinishReason = Literal["stop", "length", "abort"]
Pooling = Literal["mean", "last"]


class Constraint(Config):
    """What a text has to be, from its first token on."""

    form: Literal["json_schema", "regex", "grammar"] = Field(description="grammar: of Lark, as llguidance reads it")
    source: str = Field(description="the schema, the expression or the grammar")


class Sampling(Config):
    """How tokens are chosen and when a request ends."""

    max_tokens: NonNegativeInt = Field(256, description="new tokens at most; 0: the prompt is only read")
    min_tokens: NonNegativeInt = Field(0, description="new tokens before which nothing ends the text")
    temperature: NonNegativeFloat = Field(1.0, description="0 is greedy, and so is less than 1e-5")
    top_k: PositiveInt | None = Field(None, description="keep the k likeliest tokens; null: all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that make up this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="keep tokens of at least this share of the likeliest one")
    repetition_penalty: float = Field(1.0, gt=0, description="divides scores of tokens that occurred (multiplies < 0)")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="taken from scores of tokens that were generated")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="the same, for each time")
    logit_bias: dict[int, float] = Field({}, description="added to the scores of these tokens")
    seed: int | None = Field(None, description="the same gives the same text, in whatever company; null: any")
    stop_tokens: tuple[int, ...] = Field((), description="tokens that end the output, beside the end-of-text token")
    ignore_eos: bool = Field(False, description="go on after the end-of-text token")
    constraint: Constraint | None = Field(None, description="JSON schema, regular expression or grammar of the text")
    logprobs: NonNegativeInt | None = Field(None, description="return log probabilities, and of this many likeliest")
    prompt_logprobs: bool = Field(False, description="return the log probability of each token of the prompt")
    pooling: Pooling | None = Field(None, description="return one vector of the prompt: mean or last hidden state")

    @field_validator("temperature")
    @classmethod
    def _no_overflow(cls, temperature: float) -> float:
        return temperature if temperature >= 1e-5 else 0.0  # scores over less are infinite in float32


@dataclass(frozen=True)
class Logprob:
    """What the model thought of a token: its log probability, and those of the likeliest. In nats, at temperature 1."""

    token: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """A prompt on its way. Engine and scheduler change it; others read.

    computed: tokens whose part of the cache is there, or will be after the steps that were launched.
    in_flight: sampled tokens that were launched and are not known here yet.
    pages: for each kind of layers the pages of its tokens, in order.
    names: of its full pages, one after the other, as far as anybody has asked. They depend on its tokens only.
    published: so many of its pages can be found by their names.
    slot: its place in the tensors of the batch, while it runs.
    """

    prompt: list[int]
    sampling: Sampling
    number: int = field(default_factory=lambda: next(_numbers))
    outputs: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)  # of the outputs, where they are asked for
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # of the prompt's tokens but the first
    finish: FinishReason | None = None
    status: Status = Status.WAITING
    computed: int = 0
    cached: int = 0  # of the prompt, found in pages of others
    in_flight: int = 0
    pages: list[list[int]] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    published: int = 0
    slot: int | None = None
    ends: frozenset[int] = frozenset()  # tokens that end the text
    taps: tuple[str, ...] = ()  # modules whose outputs are wanted
    hidden: dict[str, Any] = field(default_factory=dict)  # which these are, by name; see `states.py`
    matcher: Any = None  # of its constraint, see `constrained.py`; has read all outputs
    extra: Any = None  # whatever the caller wants to find again

    @property
    def length(self) -> int:
        """Tokens in all, those in flight included."""
        return len(self.prompt) + len(self.outputs) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens that are still to go through the model."""
        return self.length - self.computed

    @property
    def exhausted(self) -> bool:
        """Nothing more is to be sampled, if only what is in flight arrives."""
        return len(self.outputs) + self.in_flight >= max(self.sampling.max_tokens, 1)  # one is drawn in any case

    @property
    def whole(self) -> bool:
        """All of the prompt has to be computed for this request, whatever others have computed."""
        return bool(self.taps or self.sampling.prompt_logprobs or self.sampling.pooling)

    @property
    def ready(self) -> bool:
        """Another token can be computed. A constraint says what may follow a token once it is known."""
        return self.pending > 0 and not self.exhausted and not (self.matcher is not None and self.in_flight)

    @property
    def place(self) -> int:
        """The slot of a request that runs."""
        if self.slot is None:
            raise ValueError(f"request {self.number} is not running")
        return self.slot

    def token(self, position: int) -> int | None:
        """None where it is in flight."""
        if position < len(self.prompt):
            return self.prompt[position]
        index = position - len(self.prompt)
        return self.outputs[index] if index < len(self.outputs) else None

    def tokens(self, begin: int, end: int) -> list[int]:
        """Those of positions begin ... end that are known."""
        before = len(self.prompt)
        return self.prompt[begin:end] + self.outputs[max(0, begin - before) : max(0, end - before)]
