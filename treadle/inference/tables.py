"""Which pages hold a request's tokens, for each kind of layers: those that see everything, and those with a window."""

from collections.abc import Iterator, Sequence

from treadle.inference.pages import NOBODY, PagePool, chain
from treadle.inference.request import Request


class Tables:
    """The pages of all requests. A request holds pages from its first scheduled token until it ends or is preempted."""

    def __init__(self, windows: Sequence[int | None], counts: Sequence[int], page: int, *, reuse: bool):
        """windows: of each kind of layers; None sees all. counts: pages of each kind. page: tokens in a page.

        reuse: find equal beginnings. Not where some layer keeps a state, which is known at a text's end only.
        """
        self.windows, self.page, self.reuse = list(windows), page, reuse
        self.pools = [PagePool(count) for count in counts]
        self._all_whole = all(window is None for window in windows)

    @property
    def free(self) -> float:
        """The share of pages that nobody holds, of the scarcest kind."""
        return min((pool.free / pool.count for pool in self.pools), default=1.0)

    def fits(self, length: int, chunk: int) -> bool:
        """Whether a request of `length` tokens, `chunk` at a time, fits if it is alone."""
        return all(self._most(i, length, chunk) <= pool.count for i, pool in enumerate(self.pools))

    def together(self, length: int, most: int) -> int:
        """How many requests of `length` tokens hold all that they need at the same time, no more than `most`."""
        return min([most, *(pool.count // self._most(kind, length, 1) for kind, pool in enumerate(self.pools))])

    def _most(self, kind: int, length: int, chunk: int) -> int:
        window = self.windows[kind]
        whole = -(-length // self.page)
        return whole if window is None else min(whole, (window + chunk - 2) // self.page + 2)

    def adopt(self, request: Request) -> None:
        """Begin with the pages that others have computed, at most so many that one token is left to compute."""
        request.pages, request.published, request.computed = [[] for _ in self.pools], 0, 0
        if not self.reuse or request.whole or not self.pools:
            return
        names = list(self._names(request, (request.length - 1) // self.page))
        while names and not self._complete(names):
            names.pop()
        if not names:
            return
        for kind, pool in enumerate(self.pools):
            first = self._first(kind, len(names) * self.page)
            request.pages[kind] = [NOBODY] * first + [pool.share(name) for name in names[first:]]
        request.published, request.computed = len(names), len(names) * self.page

    def _names(self, request: Request, pages: int) -> Iterator[bytes]:
        """Of the request's first pages, as long as layers that see everything have them."""
        whole = [pool for pool, window in zip(self.pools, self.windows, strict=True) if window is None]
        for index in range(pages):
            name = self._name(request, index)
            if not all(pool.known(name) for pool in whole):
                return
            yield name

    def _complete(self, names: Sequence[bytes]) -> bool:
        """Whether every kind knows the pages that the next token sees."""
        return all(
            pool.known(name)
            for kind, pool in enumerate(self.pools)
            for name in names[self._first(kind, len(names) * self.page) :]
        )

    def _first(self, kind: int, computed: int) -> int:
        """The first page that a token at position `computed`, or a later one, sees."""
        window = self.windows[kind]
        return 0 if window is None else max(0, computed - window + 1) // self.page

    def _name(self, request: Request, index: int) -> bytes:
        """Of a page all of whose tokens are known; those before it have been named."""
        if index == len(request.names):
            span = range(index * self.page, (index + 1) * self.page)
            tokens = [token for position in span if (token := request.token(position)) is not None]
            request.names.append(chain(request.names[-1] if index else b"", tokens))
        return request.names[index]

    def grow(self, request: Request, length: int) -> bool:
        """Take pages for the request's first `length` tokens. False, and nothing taken, if there are not enough.

        Lets go of those that no window reaches from the next token on: it is the one time when no step that was
        launched, nor the one that is being made up, reads them.
        """
        if self._all_whole and request.pages and length <= len(request.pages[0]) * self.page:
            return True  # what nearly every token finds
        self._trim(request)
        wanted = [max(0, -(-length // self.page) - len(pages)) for pages in request.pages]
        if any(number > pool.free for number, pool in zip(wanted, self.pools, strict=True)):
            return False
        for pages, number, pool in zip(request.pages, wanted, self.pools, strict=True):
            pages += pool.take(number)
        return True

    def advance(self, request: Request) -> None:
        """After `computed` has grown: let others find full pages, even in the step that will fill them."""
        # A token in flight has no value here yet, so that its page waits for the next time.
        known = min(request.computed, request.length - request.in_flight)
        while self.reuse and (request.published + 1) * self.page <= known:
            index, name = request.published, self._name(request, request.published)
            for pages, pool in zip(request.pages, self.pools, strict=True):
                if pages[index] != NOBODY:
                    pool.publish(pages[index], name)
            request.published += 1

    def _trim(self, request: Request) -> None:
        for kind, (pages, pool) in enumerate(zip(request.pages, self.pools, strict=True)):
            first = min(self._first(kind, request.computed), len(pages))
            pool.release(pages[:first])
            pages[:first] = [NOBODY] * first

    def release(self, request: Request) -> None:
        """Let go of all pages. The request may begin anew."""
        for pages, pool in zip(request.pages, self.pools, strict=False):
            pool.release(pages)
        request.pages, request.published, request.computed = [], 0, 0

    def forget(self) -> None:
        """Nothing computed so far is of use to requests to come."""
        for pool in self.pools:
            pool.forget()
