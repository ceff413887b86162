"""One step of the model for a batch of requests: tensors in, tokens out, without waiting for the device.

R requests, T new tokens of all of them, P pages, N = R + 1, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.attention import AttentionContext, Cache, PagedCache, Pages, Segment, StateCache
from treadle.inference.graphs import Decoder
from treadle.inference.request import Request
from treadle.inference.sampler import Sampled, Sampler, described, to_host
from treadle.inference.scheduler import Work
from treadle.inference.states import Taps
from treadle.inference.tables import Tables
from treadle.nn.transformer import Transformer

PIECE = 512  # tokens of a prompt whose scores are held at the same time


@dataclass(frozen=True)
class Launched:
    """A step on its way. `arrived` waits for it.

    requests: those whose next tokens are drawn, in the order of `sampled`.
    prompts: what was asked of prompts: the request, the step's first token of it, and what follows each of them.
    states: hidden states that were asked for: the request, the step's first token of it, and what was found.
    drafts: the requests' guesses, after each of which one more token is drawn; empty: nobody has any.
    """

    requests: list[Request]
    sampled: Sampled
    prompts: list[tuple[Request, int, Sampled]] = field(default_factory=list)
    states: list[tuple[Request, int, dict[str, Tensor]]] = field(default_factory=list)
    drafts: list[Sequence[int]] = field(default_factory=list)
    event: Any = None

    def arrived(self) -> "Launched":
        if self.event is not None:
            self.event.synchronize()
        return self


class Storage:
    """The tensors that hold all requests' caches: pages for layers that keep tokens, slots for those with a state."""

    def __init__(self, model: Transformer, windows: Sequence[int | None], counts: Sequence[int], page: int, slots: int):
        """windows, counts: of each kind, as `Tables` has them. One page and one slot more take what padding writes."""
        self.model, self.counts, self.page, self.slots = model, list(counts), page, slots
        mixers: dict[int, Any] = {int(name): layer.mixer for name, layer in model.layers.items()}
        self.kinds = {index: kind_of(mixer, windows) for index, mixer in mixers.items()}
        self.layers: dict[int, Any] = {}
        self.allocate()

    def allocate(self) -> None:
        for index, kind in self.kinds.items():
            mixer: Any = self.model.layers[str(index)].mixer
            rows, capacity = (self.slots + 1, 0) if kind is None else (self.counts[kind] + 1, self.page)
            self.layers[index] = mixer.make_cache(rows, capacity, self.model.dtype, self.model.device)

    def free(self) -> None:
        self.layers.clear()

    def caches(self, pages: Sequence[Pages], segments: Sequence[Segment]) -> Cache:
        made: dict[int, Any] = {}
        for layer, store in self.layers.items():
            kind = self.kinds[layer]
            made[layer] = StateCache(store, segments) if kind is None else PagedCache(store.buffers, pages[kind])
        return Cache(made)


def windows_of(model: Transformer) -> list[int | None]:
    """The kinds of layers that keep tokens, by how far they see; None is everything."""
    mixers: list[Any] = [layer.mixer for layer in model.layers.values()]  # type: ignore[union-attr]
    return list(dict.fromkeys(mixer.facts.window for mixer in mixers if mixer.cache_elements()))


def is_recurrent(model: Transformer) -> bool:
    """Whether some layer keeps a state instead of tokens."""
    mixers: list[Any] = [layer.mixer for layer in model.layers.values()]  # type: ignore[union-attr]
    return any(not mixer.cache_elements() for mixer in mixers)


def kind_of(mixer: Any, windows: Sequence[int | None]) -> int | None:
    """The index of a mixer's kind; None: it keeps a state."""
    return windows.index(mixer.facts.window) if mixer.cache_elements() else None


class Runner:
    """Runs steps of one model."""

    def __init__(
        self, model: Transformer, tables: Tables, storage: Storage, taps: Taps, slots: int, backend: str = "auto"
    ):
        self.model, self.tables, self.storage, self.backend = model, tables, storage, backend
        self.device = model.device
        self.taps = taps
        self.sampler = Sampler(slots, model.config.vocab_size or 0, self.device)
        self.decoder: Decoder | None = None

    def use_graphs(self, length: int) -> None:
        """Let a `Decoder` take the steps that it can. length: of the longest request."""
        self.decoder = Decoder(self.model, self.storage, self.sampler, length, self.backend)

    @torch.inference_mode()
    def launch(self, work: Sequence[Work]) -> Launched:
        """Queue a step; on a GPU it runs while the host goes on."""
        with torch.compiler.set_stance("force_eager"):
            launched = self._decode(work) or self._launch(work)
        return launched if self.device.type == "cpu" else _home(launched)

    def _decode(self, work: Sequence[Work]) -> Launched | None:
        if self.decoder is None:
            return None
        taken = self.decoder.takes(work) and not self.taps.active
        sampled = self.decoder.launch(work) if taken else None
        if sampled is None:
            self.decoder.forget(work)
            return None
        return Launched([part.request for part in work], sampled)

    def _launch(self, work: Sequence[Work]) -> Launched:
        """Any step."""
        tokens_1T, context = self._batch(work)
        x_1TD = self.model.hidden(tokens_1T, context)
        ends = np.cumsum([part.end - part.begin for part in work])
        prompts = [
            (part.request, part.begin, self._prompt(part, x_1TD[0, end - (part.end - part.begin) : end]))
            for part, end in zip(work, ends.tolist(), strict=True)
            if part.request.sampling.prompt_logprobs and part.begin < len(part.request.prompt) - 1
        ]
        states = [
            (part.request, part.begin, self.taps.found(part.request, begin, end, x_1TD[0]))
            for part, begin, end in zip(work, [0, *ends.tolist()], ends.tolist(), strict=False)
            if part.request.taps or part.request.sampling.pooling
        ]
        rows, asked = _drawn(work, ends.tolist())
        logits_RV = self.model.head(x_1TD[0, self._tensor(rows)])
        sampling = [part for part in work if part.samples]
        requests, drafts = [part.request for part in sampling], [part.draft for part in sampling]
        return Launched(requests, self.sampler.draw(logits_RV, asked), prompts, states, drafts)

    def _prompt(self, part: Work, x_TD: Tensor) -> Sampled:
        """Of each token of a prompt after its first, a few at a time: there are never scores of many at once."""
        prompt, most = part.request.prompt, part.request.sampling.logprobs or 0
        targets_T = self._tensor(np.array(prompt[part.begin + 1 : part.end + 1]))
        pieces = []
        for x_CD, targets_C in zip(x_TD[: len(targets_T)].split(PIECE), targets_T.split(PIECE), strict=True):
            logits_CV = self.model.head(x_CD).float()
            pieces.append(described(logits_CV, targets_C, most))
        return pieces[0] if len(pieces) == 1 else Sampled.cat(pieces)

    def _batch(self, work: Sequence[Work]) -> tuple[Tensor, AttentionContext]:
        lengths = np.array([part.end for part in work])
        counts = np.array([part.end - part.begin for part in work])
        starts = np.concatenate(([0], np.cumsum(counts)))
        positions = np.concatenate([np.arange(part.begin, part.end) for part in work])
        tokens_T = self._tokens(work, starts)
        shared = self._tensor(lengths, np.int32), self._tensor(starts, np.int32)
        requests = np.repeat(np.arange(len(work)), counts)
        pages = [self._pages(kind, work, requests, positions, shared) for kind in range(len(self.tables.pools))]
        context = AttentionContext(
            self._tensor(positions)[None],
            documents_BS=self._tensor(requests, np.int32)[None],
            backend=self.backend,
            cache=self.storage.caches(pages, self._segments(work, starts)),
        )
        return tokens_T[None], context

    def _tokens(self, work: Sequence[Work], starts: Any) -> Tensor:
        """One after the other. Those in flight, the last of their requests, only the device knows."""
        values: list[int] = []
        missing: list[int] = []
        for row, part in enumerate(work):
            values += part.request.tokens(part.begin, part.end - len(part.draft))
            if len(values) + len(part.draft) < starts[row + 1]:
                missing.append(row)
                values.append(0)
            values += part.draft
        tokens_T = self._tensor(values)
        if missing:  # they have no guesses after them
            slots_R = self._tensor([work[row].request.place for row in missing])
            tokens_T[self._tensor(starts[1:][missing] - 1)] = self.sampler.latest_S[slots_R]
        return tokens_T

    def _pages(
        self, kind: int, work: Sequence[Work], requests: Any, positions: Any, shared: tuple[Tensor, Tensor]
    ) -> Pages:
        size = self.tables.page
        width = max(-(-part.end // size) for part in work)
        tables = np.zeros((len(work), width), dtype=np.int32)
        for row, part in enumerate(work):
            held = part.request.pages[kind][:width]  # guesses that were wrong leave it with more than it needs
            tables[row, : len(held)] = held
        slots = tables[requests, positions // size].astype(np.int64) * size + positions % size
        longest = max(part.end - part.begin for part in work)
        return Pages(self._tensor(slots), self._tensor(tables, np.int32), *shared, longest)

    def _segments(self, work: Sequence[Work], starts: Any) -> list[Segment]:
        """Those with one token together, each other request by itself."""
        if all(kind is not None for kind in self.storage.kinds.values()):
            return []
        single = sum(part.end - part.begin == 1 for part in work)
        bounds = [(0, single)] if single else []
        bounds += [(index, index + 1) for index in range(single, len(work))]
        return [
            Segment(
                *(int(starts[first]), int(starts[last]), last - first),
                self._tensor(np.array([part.request.place for part in work[first:last]])),
            )
            for first, last in bounds
        ]

    def _tensor(self, values: Any, dtype: Any = np.int64) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)


def _drawn(work: Sequence[Work], ends: Sequence[int]) -> tuple[list[int], list[Request]]:
    """The rows of a step after which a token is drawn, and the request as it is at each, if the guesses are right."""
    rows: list[int] = []
    requests: list[Request] = []
    for part, end in zip(work, ends, strict=True):
        if part.samples:
            guesses = len(part.draft)
            rows += range(end - 1 - guesses, end)
            requests.append(part.request)
            requests += [replace(part.request, in_flight=part.request.in_flight + i + 1) for i in range(guesses)]
    return rows, requests


def _home(launched: Launched) -> Launched:
    """The same in the host's memory, once it has `arrived`."""
    prompts = [(request, begin, sampled.to_host()) for request, begin, sampled in launched.prompts]
    sampled = launched.sampled.to_host()
    states = [(request, begin, {k: to_host(x) for k, x in found.items()}) for request, begin, found in launched.states]
    event = torch.cuda.Event()
    event.record()
    return Launched(launched.requests, sampled, prompts, states, launched.drafts, event)
