"""Steps in which each request has one new token, as CUDA graphs: all of a step, the draw included, in one launch.

A graph repeats kernels on the same memory. So what a step reads lies in tensors that stay where they are: by slot, the
last token, the pages, temperature and seed; by row, in one tensor that is copied for each step, who is in which row. A
graph is captured the first time that its size is needed. Rows that are left over belong to one slot more, which is
nobody's, and write to the page that is nobody's.

B rows of a graph, R of them requests, S slots and nobody's, P pages, X facts of a row, V vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle import kernels
from treadle.attention import AttentionContext, Pages, Segment
from treadle.inference.request import Request
from treadle.inference.sampler import Sampled, Sampler, plain_from
from treadle.inference.scheduler import Work
from treadle.nn.transformer import Transformer

FEWEST_PAGES = 16
ON_DEVICE = -1  # in place of a token that only the device knows

Found = Tensor | tuple[Tensor, Tensor]  # scores_BV, or tokens_B and their logprobs_B


class Decoder:
    """Runs such steps of one model: captured on a GPU; on a CPU, for tests, as they are."""

    def __init__(self, model: Transformer, storage: Any, sampler: Sampler, length: int, backend: str = "auto"):
        """storage: a `runner.Storage`. length: of the longest request, in tokens."""
        self.model, self.storage, self.sampler, self.backend = model, storage, sampler, backend
        self.slots, self.page, self.device = storage.slots, storage.page, model.device
        self.widest = -(-length // self.page)
        # Experts with a capacity would give a part of it to nobody's rows.
        self.possible = not any(getattr(module, "capacity", None) for module in model.modules())
        slots = self.slots + 1
        with torch.device(self.device):
            self.tables_SP = [torch.zeros(slots, self.widest, dtype=torch.int32) for _ in storage.counts]
            self.temperatures_S, self.seeds_S = torch.zeros(slots), torch.zeros(slots, dtype=torch.int64)
            self.count = torch.arange(slots + 1, dtype=torch.int32)
            self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Whose pages the device knows; and the positions from which on nothing rare is asked of a draw.
        self.owners: list[Any] = [None] * self.slots
        self.plain_S = np.zeros(self.slots, dtype=np.int64)
        self.steps: dict[tuple[int, int, bool], tuple[Tensor, Callable[[], Found]]] = {}
        self.pool: Any = None

    def clear(self) -> None:
        """Drop all graphs: the memory that they know is about to go."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)
        self.steps, self.pool = {}, None

    def takes(self, work: Sequence[Work]) -> bool:
        return self.possible and all(map(_is_usual, work))

    def forget(self, work: Sequence[Work]) -> None:
        """These requests move on by other steps."""
        for part in work:
            self.owners[part.request.place] = None

    def launch(self, work: Sequence[Work]) -> Sampled | None:
        """Queue a step that it `takes`. None, and nothing is queued, where the model turns out not to be capturable."""
        requests, rows = [part.request for part in work], rows_for(len(work), self.slots)
        slots, positions = [request.place for request in requests], [part.begin for part in work]
        self._meet(requests)
        plain = bool((np.array(positions) + 1 >= self.plain_S[slots]).all())
        key = rows, self._width(max(positions) // self.page + 1), plain
        if key not in self.steps:
            facts_XB = torch.zeros(3 + len(self.tables_SP), rows, dtype=torch.int64, device=self.device)
            facts_XB[0] = self.slots
            step = partial(self._step, facts_XB, *key[1:])
            captured = step if self.stream is None else self._capture(step, self.stream)
            if captured is None:
                return None
            self.steps[key] = facts_XB, captured
        facts_XB, run = self.steps[key]
        host = np.zeros(facts_XB.shape, dtype=np.int64)
        host[0, len(work) :] = self.slots
        tokens = [part.request.token(part.begin) for part in work]
        pages = [[part.request.pages[kind][part.begin // self.page] for part in work] for kind in self._kinds]
        host[:, : len(work)] = [slots, [ON_DEVICE if token is None else token for token in tokens], positions, *pages]
        facts_XB.copy_(self._pinned(host), non_blocking=True)
        found = run()
        if isinstance(found, Tensor):
            return self.sampler.draw(found[: len(work)], requests)
        return Sampled(*(x[: len(work)] for x in found))

    @property
    def _kinds(self) -> range:
        return range(len(self.tables_SP))

    def _width(self, pages: int) -> int:
        return min(max(FEWEST_PAGES, 1 << (pages - 1).bit_length()), self.widest)

    def _meet(self, requests: Sequence[Request]) -> None:
        """Tell the device about requests that it does not know in their slots. `pages` is another list each time that
        a request begins, and grows by steps of this decoder alone, which take the last page along.
        """
        new = [request for request in requests if self.owners[request.place] is not request.pages]
        if not new:
            return
        slots = [request.place for request in new]
        for request, slot in zip(new, slots, strict=True):
            self.owners[slot], self.plain_S[slot] = request.pages, plain_from(request)
        slots_R = self._pinned(np.array(slots)).to(self.device, non_blocking=True)
        rows = np.zeros((len(self.tables_SP), len(new), self.widest), dtype=np.int32)
        for kind in self._kinds:
            for row, request in zip(rows[kind], new, strict=True):
                held = request.pages[kind][: self.widest]
                row[: len(held)] = held
        temperatures = np.array([request.sampling.temperature for request in new], dtype=np.float32)
        seeds = np.array([self.sampler.seed(request) for request in new])
        known = [*self.tables_SP, self.temperatures_S, self.seeds_S]
        for there_S, here in zip(known, [*rows, temperatures, seeds], strict=True):
            there_S[slots_R] = self._pinned(here).to(self.device, non_blocking=True)

    def _step(self, facts_XB: Tensor, width: int, plain: bool) -> Found:
        """What is captured. It reads and writes tensors that stay, and never waits for the device."""
        slots_B, given_B, positions_B, *pages_B = facts_XB.unbind()
        rows, latest_S = len(slots_B), self.sampler.latest_S
        tokens_B = torch.where(given_B >= 0, given_B, latest_S[slots_B])
        lengths_B, starts = (positions_B + 1).int(), self.count[: rows + 1]
        index_B, place_B = positions_B // self.page, positions_B % self.page
        pages = []
        for table_SP, page_B in zip(self.tables_SP, pages_B, strict=True):
            table_SP[slots_B, index_B] = page_B.int()
            table_BP = table_SP[:, :width].index_select(0, slots_B)
            pages.append(Pages(page_B * self.page + place_B, table_BP, lengths_B, starts, 1))
        cache = self.storage.caches(pages, [Segment(0, rows, rows, slots_B)])
        documents_1B = self.count[None, :rows]
        context = AttentionContext(positions_B[None], documents_1B, backend=self.backend, cache=cache)
        logits_BV: Tensor = self.model.head(self.model.hidden(tokens_B[None], context)[0])
        if not plain:
            return logits_BV
        asked = self.temperatures_S[slots_B], self.seeds_S[slots_B], positions_B + 1
        tokens_B, logprobs_B = kernels.draw(logits_BV, *asked)
        latest_S[slots_B] = tokens_B
        return tokens_B, logprobs_B

    def _capture(self, step: Callable[[], Found], stream: Any) -> Callable[[], Found] | None:
        """A graph of a step, whose rows are all nobody's by now. None, with a warning, where the step reads numbers."""
        here = torch.cuda.current_stream(self.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            try:
                _forbid_waiting(True)
                step()  # kernels are compiled, libraries take their memory
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                warnings.warn(
                    f"steps run without CUDA graphs, as the model waits for the device: {error}", stacklevel=2
                )
                self.possible = False
                return None
            finally:
                _forbid_waiting(False)
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            # Without the context manager of PyTorch's, which would also empty the allocator's cache.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                found = step()
            finally:
                graph.capture_end()
        here.wait_stream(stream)

        def replay() -> Found:
            graph.replay()
            return found

        return replay

    def _pinned(self, values: Any) -> Tensor:
        host = torch.from_numpy(values)
        return host if self.device.type == "cpu" else host.pin_memory()


def _is_usual(part: Work) -> bool:
    """One token, after which the next one is drawn, and nothing else is asked for."""
    return part.end - part.begin == 1 and part.samples and not part.request.sampling.pooling


def _forbid_waiting(forbid: bool) -> None:
    """Whether it is an error to wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch does not notice everything
        torch.cuda.set_sync_debug_mode("error" if forbid else "default")


def rows_for(requests: int, slots: int) -> int:
    """The rows of the graph that takes so many requests: 1, 2, 4, 8, 16, then steps of 16."""
    return min(slots, 1 << (requests - 1).bit_length() if requests <= 16 else -(-requests // 16) * 16)
