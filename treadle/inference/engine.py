"""The engine: any number of requests in, tokens out, the same model that trains inside.

Each step the scheduler says who computes what, the runner launches it, and while the device works the host looks at
what the step before has drawn. So a request that ends at an end-of-text token computes one token too many, unseen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from treadle.config import Config
from treadle.data.tokenizer import Tokenizer
from treadle.errors import ConfigError
from treadle.inference.constrained import Grammars
from treadle.inference.quantised import QuantisedLinear
from treadle.inference.request import FinishReason, Pooling, Request, Sampling, Status
from treadle.inference.runner import Launched, Runner, Storage, is_recurrent, windows_of
from treadle.inference.sampler import Sampled
from treadle.inference.scheduler import Policy, Scheduler
from treadle.inference.speculative import Draft, speculation_of
from treadle.inference.states import POOLED, Taps, collect, cut, embedding
from treadle.inference.tables import Tables
from treadle.nn.flops import cache_elements, state_elements
from treadle.nn.transformer import Transformer

WORKSPACE = 2 << 30  # bytes for activations, scores and graphs


class EngineConfig(Config):
    """How much an engine does at a time."""

    slots: PositiveInt = Field(256, description="requests that run at the same time")
    budget: PositiveInt = Field(8192, description="tokens in a step, prompts included")
    page: PositiveInt = Field(64, description="tokens in a page of the cache")
    cache_tokens: PositiveInt | None = Field(None, description="tokens in the cache; null: as memory allows")
    memory: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory that weights and cache may take")
    policy: Policy = Field("throughput", description="throughput: prompts first; latency: both in each step")
    ahead: bool = Field(True, description="launch a step before the one before has been read")
    graphs: bool = Field(True, description="on a GPU, steps without prompts are launched as CUDA graphs")
    speculate: NonNegativeInt = Field(0, description="tokens that are guessed ahead, and read in one step")
    reuse: bool = Field(True, description="compute equal beginnings of prompts once")
    max_length: PositiveInt | None = Field(None, description="tokens of a request; null: the model's max_length")
    backend: str = Field("auto", description="of attention")


def longest(model: Transformer, config: EngineConfig) -> int:
    """Tokens of a request."""
    return min(config.max_length or model.config.max_length, model.config.max_length)


def page_counts(
    model: Transformer, config: EngineConfig, memory: tuple[float, float] | None, draft: Transformer | None = None
) -> list[int]:
    """Pages of each kind of layers: of as many tokens as are asked for, or as fit the memory that the model leaves.

    memory: of the device, bytes that are free with the models on it, and all. None: nobody knows. draft: has a cache of
    as many tokens. Raises ConfigError where not one request of full length fits.
    """
    tokens, length = config.cache_tokens, longest(model, config)
    if tokens is None and memory is not None:
        free, total = memory
        room = free - (1 - config.memory) * total - WORKSPACE
        each = sum(cache_elements(one) * one.dtype.itemsize for one in (model, draft) if one is not None)
        states = (config.slots + 1) * state_elements(model) * 4
        tokens = int((room - states) // each) if each else config.slots * length
        if tokens < length:
            raise ConfigError(
                f"memory: {config.memory} leaves room for {max(tokens, 0)} tokens of cache, less than one request of "
                f"max_length={length}; raise it, or lower max_length"
            )
    tokens = min(tokens or config.slots * min(length, 1024), config.slots * length)
    return [-(-tokens // config.page) for _ in windows_of(model)]


class Engine:
    """Serves one model. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        *,
        eos: int | None = None,
        tokenizer: Tokenizer | None = None,
        draft: Transformer | None = None,
    ):
        """eos: the token that ends a text; None: the tokenizer's. tokenizer: without one, texts have no constraints.

        draft: a smaller model that guesses `speculate` tokens; None: they are looked up in the text so far.
        """
        self.model, self.config = model.eval(), config or EngineConfig()
        self.eos = tokenizer.eos_id if eos is None and tokenizer is not None else eos
        self._grammars = Grammars(tokenizer, model.config.vocab_size or 0)
        c = self.config
        self.max_length = longest(model, c)
        windows, memory = windows_of(model), None
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            memory = torch.cuda.mem_get_info(model.device)
        counts = page_counts(model, c, memory, draft)
        self.tables = Tables(windows, counts, c.page, reuse=c.reuse and not is_recurrent(model))
        self.scheduler = Scheduler(self.tables, slots=c.slots, budget=c.budget, policy=c.policy)
        self.taps = Taps(model, c.budget)
        storage = Storage(model, windows, counts, c.page, c.slots)
        self.runner = Runner(model, self.tables, storage, self.taps, c.slots, c.backend)
        if c.graphs and model.device.type == "cuda":
            self.runner.use_graphs(self.max_length)
        self.speculation = speculation_of(c, model, draft, self.runner, max(counts, default=1) * c.page)
        if self.speculation is not None:
            self.scheduler.drafts = self.speculation.drafts
        self._launched: Launched | None = None

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        extra: object = None,
        *,
        taps: Sequence[str] = (),
    ) -> Request:
        """Queue a request. Raises ConfigError for one that can never run.

        taps: modules, as `named_modules` calls them, whose output for each token is in `hidden` once the request has
        ended: [tokens, width], of the prompt and all new tokens but the last, which has not gone through the model.
        """
        sampling = sampling or Sampling()
        eos = () if self.eos is None or sampling.ignore_eos else (self.eos,)
        request = Request(list(prompt), sampling, ends=frozenset({*sampling.stop_tokens, *eos}), extra=extra)
        request.taps = tuple(taps)
        if not request.prompt:
            raise ConfigError("prompt: it has no token; begin with the end-of-text token to sample from nothing")
        vocabulary = self.model.config.vocab_size or 0
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
            wrong = next(token for token in request.prompt if not 0 <= token < vocabulary)
            raise ConfigError(f"prompt: token {wrong} is not in the vocabulary of {vocabulary}")
        length = len(request.prompt) + request.sampling.max_tokens
        if length > self.max_length:
            key = "max_tokens" if sampling.max_tokens else "prompt"
            raise ConfigError(
                f"{key}: {len(request.prompt)} tokens of the prompt and {sampling.max_tokens} new ones are more "
                f"than the engine's max_length={self.max_length}; lower max_tokens or shorten the prompt"
            )
        if not self.tables.fits(length, min(length, self.config.budget)):
            raise ConfigError(
                f"max_tokens: {length} tokens do not fit the cache; raise cache_tokens, or lower max_tokens"
            )
        self._check_tokens(sampling, vocabulary)
        if not self.runner.storage.layers:
            raise ConfigError("the engine sleeps and has no cache; wake() it first")
        if sampling.constraint is not None:
            if sampling.ignore_eos or sampling.min_tokens:
                key = "ignore_eos" if sampling.ignore_eos else "min_tokens"
                raise ConfigError(f"{key}: not with a constraint, which says itself where the text may end")
            request.matcher = self._grammars.matcher(sampling.constraint)
        self.taps.open(request.taps)
        self.scheduler.add(request)
        return request

    @staticmethod
    def _check_tokens(sampling: Sampling, vocabulary: int) -> None:
        for key, tokens in (("logit_bias", sampling.logit_bias), ("stop_tokens", sampling.stop_tokens)):
            for token in tokens:
                if not 0 <= token < vocabulary:
                    raise ConfigError(f"{key}: token {token} is not in the vocabulary of {vocabulary}")
        for token, bias in sampling.logit_bias.items():
            if not math.isfinite(bias):
                raise ConfigError(f"logit_bias: {bias} for token {token} is no finite number; use -100 to forbid it")

    def abort(self, request: Request) -> None:
        """End a request now, whatever it is doing. Ended ones are left alone."""
        if request.status is not Status.FINISHED:
            self._finish(request, "abort")

    def score(self, texts: Iterable[Sequence[int]]) -> list[list[float]]:
        """The log probability of each token but the first, given those before it, in nats."""
        asked = Sampling(max_tokens=0, temperature=0, prompt_logprobs=True)
        return [[each.logprob for each in done.prompt_logprobs] for done in self.generate(texts, asked)]

    def update_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights, by the model's names, in place; some of them will do. What was computed is forgotten.

        Raises ValueError, and takes none, for wrong names, shapes or numbers of 8 bits without their scales; and while
        requests run, whose beginnings are those of the old weights.
        """
        self._rest("the weights change")
        own: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        own |= dict(self.model.named_buffers(remove_duplicate=False))
        if unknown := sorted(set(weights) - set(own)):
            raise ValueError(f"the model has no weights {', '.join(unknown[:3])}")
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name}: shape {list(tensor.shape)}, but the model's is {list(own[name].shape)}")
            if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
                raise ValueError(f"{name}: {tensor.dtype} without its scales; give the weights before `quantise`")
        with torch.no_grad():
            for name, tensor in weights.items():
                path, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(path)
                if isinstance(module, QuantisedLinear) and leaf == "weight":
                    module.take(tensor)
                else:
                    own[name].copy_(tensor)
        self.tables.forget()

    def sleep(self) -> None:
        """Give the cache's memory back, between requests. `wake` before the next one."""
        self._rest("the engine sleeps")
        if self.runner.decoder is not None:
            self.runner.decoder.clear()
        for storage in self._storages:
            storage.free()
        self.tables.forget()

    def wake(self) -> None:
        """Take the cache's memory again; of no effect on an engine that is awake."""
        for storage in self._storages:
            if not storage.layers:
                storage.allocate()

    def _rest(self, what: str) -> None:
        """Raises ValueError while requests run. A step may be on its way even so, with a token too many of those that
        have ended, which nobody reads: the device takes it before whatever comes next.
        """
        if self.scheduler.waiting or self.scheduler.running:
            raise ValueError(f"requests are running: let them end, or abort them, before {what}")
        self._launched = None

    @property
    def _storages(self) -> list[Storage]:
        proposer = None if self.speculation is None else self.speculation.proposer
        return [self.runner.storage, *([proposer.storage] if isinstance(proposer, Draft) else [])]

    @property
    def busy(self) -> bool:
        return bool(self._launched or self.scheduler.waiting or self.scheduler.running)

    @property
    def _ahead(self) -> bool:
        """Whether somebody can run ahead: guesses and constraints need the tokens before."""
        waits = self.speculation is not None or all(r.matcher is not None for r in self.scheduler.running)
        return self.config.ahead and not waits

    def step(self) -> list[tuple[Request, int]]:
        """Launch the next step and read the one before.  -> (request, its new token), of those that still run"""
        before, self._launched = self._launched, None
        try:
            if before is None or self._ahead:
                work = self.scheduler.schedule()
                self._launched = self.runner.launch(work) if work else None
            return [] if before is None else self._read(before)
        except BaseException:
            # Pages were promised that nobody has filled, tokens that nobody will read: whoever could ends, and the
            # pages are not found again.
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                self.abort(request)
            self.tables.forget()
            raise

    def embed(self, texts: Iterable[Sequence[int]], pooling: Pooling = "mean") -> list[Tensor]:
        """A vector of length 1 for each text: of what the head reads, the mean or the last token's."""
        asked = Sampling(max_tokens=0, temperature=0, pooling=pooling)
        return [embedding(done.hidden[POOLED]) for done in self.generate(texts, asked)]

    def generate(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        taps: Sequence[str] = (),
    ) -> list[Request]:
        """All prompts to their ends, in their order. sampling: one for all, or one each. taps: see `add`."""
        prompts = list(prompts)
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        requests: list[Request] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                requests.append(self.add(prompt, one, taps=taps))
            while any(request.status is not Status.FINISHED for request in requests):
                self.step()
        except BaseException:  # also Ctrl-C: nothing of this call goes on
            for request in requests:
                self.abort(request)
            raise
        return requests

    def _read(self, launched: Launched) -> list[tuple[Request, int]]:
        launched.arrived()
        for request, begin, sampled in launched.prompts:
            # After a preemption what is known already comes again.
            rows = range(max(0, len(request.prompt_logprobs) - begin), len(sampled.tokens_R))
            request.prompt_logprobs += [sampled.token(row, request.sampling.logprobs) for row in rows]
        for request, begin, found in launched.states:
            if request.status is not Status.FINISHED:
                collect(request, begin, found)
        new, first, tokens = [], 0, launched.sampled.tokens_R.tolist()
        drafts = launched.drafts or [()] * len(launched.requests)
        for request, draft in zip(launched.requests, drafts, strict=True):
            kept = 1
            if draft and self.speculation is not None and request.status is not Status.FINISHED:
                kept += self.speculation.accept(draft, tokens[first:])
            if request.status is Status.RUNNING:
                request.computed -= len(draft) + 1 - kept
            request.in_flight -= 1
            for row in range(first, first + kept):
                if request.status is not Status.FINISHED and self._take(request, tokens[row], launched.sampled, row):
                    new.append((request, tokens[row]))
            first += 1 + len(draft)
        return new

    def _take(self, request: Request, token: int, sampled: Sampled, row: int) -> bool:
        """A new token of a request that goes on. False: nothing but its prompt was asked for."""
        if not request.sampling.max_tokens:
            self._finish(request, "length")
            return False
        request.outputs.append(token)
        if request.matcher is not None:
            request.matcher.consume_token(token)
        if request.sampling.logprobs is not None:
            request.logprobs.append(sampled.token(row, request.sampling.logprobs))
        reason = self._ended(request, token)
        if request.matcher is not None and request.matcher.is_error():  # it is too much for llguidance after all
            reason = "abort"
        if reason is not None:
            self._finish(request, reason)
        return True

    def _ended(self, request: Request, token: int) -> FinishReason | None:
        sampling = request.sampling
        if token in request.ends:  # not before `min_tokens`, see the sampler
            return "stop"
        return "length" if len(request.outputs) >= sampling.max_tokens else None

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish = reason
        self.taps.close(request.taps)
        cut(request)
        if self.speculation is not None:
            self.speculation.proposer.forget(request)
        self.scheduler.finish(request)
