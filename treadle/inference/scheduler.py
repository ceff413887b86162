"""Who computes what in the next step: continuous batching (Orca, OSDI 2022), prompts in chunks (arXiv:2308.16369)."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from treadle.inference.request import Request, Status
from treadle.inference.tables import Tables

Drafts = Callable[[Sequence[Request], int], Mapping[Request, Sequence[int]]]  # see `Speculation.drafts`
Policy = Literal["throughput", "latency"]

PATIENCE = 16  # steps with prompts only, after which those that are generating get one
WATERMARK = 0.01  # share of pages that is kept for those that are running when another one is let in


@dataclass(frozen=True)
class Work:
    """A request's part of a step: tokens begin ... end; `samples` if the next token is drawn after them.

    draft: the last of these tokens are guesses; after each of them, and the token before, one is drawn.
    """

    request: Request
    begin: int
    end: int
    samples: bool
    draft: Sequence[int] = ()


class Scheduler:
    """First come, first served. Each step is given at most `budget` tokens and `slots` requests.

    throughput: prompts by themselves before anything is generated: the largest batches. latency: whoever generates gets
    its token in every step, and prompts fill up what is left of the budget.
    """

    def __init__(self, tables: Tables, *, slots: int, budget: int, policy: Policy = "throughput"):
        self.tables, self.budget, self.policy = tables, budget, policy
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they came
        self._slots = list(range(slots - 1, -1, -1))
        self._prompts_only = 0
        self.preemptions = 0
        self.drafts: Drafts = lambda requests, room: {}

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its pages and its slot are free again."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._leave(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def schedule(self) -> list[Work]:
        """The next step, whose pages are taken and whose requests are moved on. Those with one token come first."""
        work = self._schedule()
        # Several that have begun may together hold all pages, and none can go on; one alone always fits.
        while not work and len(self.running) > 1 and not any(request.in_flight for request in self.running):
            self._preempt(self.running[-1])
            work = self._schedule()
        return sorted(work, key=lambda part: part.end - part.begin > 1)

    def _schedule(self) -> list[Work]:
        ready = [request for request in self.running if request.ready]
        if self.policy == "latency":
            work = self._generate(ready)
            return work + self._prompts(ready, self.budget - sum(part.end - part.begin for part in work))
        generating = any(request.pending == 1 for request in ready)
        work = [] if generating and self._prompts_only >= PATIENCE else self._prompts(ready, self.budget)
        self._prompts_only = self._prompts_only + 1 if work and generating else 0
        return work or self._generate(ready)

    def _generate(self, ready: Iterable[Request]) -> list[Work]:
        """One token each, for those that have all but one, and what is guessed to follow it as far as there is room."""
        chosen = [request for request in ready if request.pending == 1][: self.budget]
        drafts, work = self.drafts(chosen, self.budget - len(chosen)), []
        for request in chosen:
            if request.status is not Status.RUNNING:
                continue
            draft = drafts.get(request, ())
            if draft and not self.tables.grow(request, request.computed + 1 + len(draft)):
                draft = ()
            if self._make_room(request):
                work.append(self._move(request, 1, draft))
        return work

    def _make_room(self, request: Request) -> bool:
        """Pages for one more token, taken from those that came last if need be. False: it was itself the last."""
        while not self.tables.grow(request, request.computed + 1):
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue; what it has computed is lost, its tokens are kept."""
        self.running.remove(request)
        self._leave(request)
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _leave(self, request: Request) -> None:
        self.tables.release(request)
        if request.slot is not None:
            self._slots.append(request.slot)
            request.slot = None

    def _prompts(self, ready: Iterable[Request], budget: int) -> list[Work]:
        """Chunks of prompts: of those that have begun, then of those that wait, as far as budget and pages reach."""
        work: list[Work] = []
        for request in ready:
            if request.pending > 1 and request.status is Status.RUNNING and budget > 0:
                chunk = min(request.pending, budget)
                if not self.tables.grow(request, request.computed + chunk):
                    return work  # or those that came later would take every page that comes free
                work.append(self._move(request, chunk))
                budget -= chunk
        while self.waiting and self._slots and budget > 0:
            request = self.waiting[0]
            if request.in_flight:  # it was preempted a moment ago, and its last token is on its way
                break
            if self.running and self.tables.free < WATERMARK:
                break
            self.tables.adopt(request)
            chunk = min(request.pending, budget)
            if not self.tables.grow(request, request.computed + chunk):
                self.tables.release(request)
                break
            self.waiting.popleft()
            request.cached = min(request.computed, len(request.prompt))
            request.status, request.slot = Status.RUNNING, self._slots.pop()
            self.running.append(request)
            work.append(self._move(request, chunk))
            budget -= chunk
        return work

    def _move(self, request: Request, tokens: int, draft: Sequence[int] = ()) -> Work:
        begin = request.computed
        request.computed += tokens
        samples = request.computed == request.length
        self.tables.advance(request)
        if samples:
            request.in_flight += 1
        request.computed += len(draft)
        return Work(request, begin, request.computed, samples, draft)
