"""The pages of the cache: which are free, who holds which, and which hold a beginning that another request may reuse.

A full page is known by the hash of everything up to its end, so that a request whose prompt begins in the same way
takes the page instead of computing it again. A page that nobody holds stays known until it is needed for something
else, the longest unused one first.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

NOBODY = 0  # the page that fills up tables and takes what padding writes


class PagePool:
    """Pages of one kind of layers, numbered from 1."""

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"a pool needs at least one page, got {count}")
        self.count = count
        self._holders = [0] * (count + 1)
        self._free = dict.fromkeys(range(1, count + 1))  # in the order in which they were let go
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds; some of them may still be known."""
        return len(self._free)

    def take(self, number: int) -> list[int]:
        """Pages to write to. The caller has asked whether that many are `free`."""
        taken = []
        for _ in range(number):
            page = next(iter(self._free))
            del self._free[page]
            if (known := self._hash_of.pop(page, None)) is not None:
                del self._page_of[known]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def known(self, name: bytes) -> bool:
        return name in self._page_of

    def idle(self, name: bytes) -> bool:
        """Whether sharing this known page takes it from the free ones."""
        return self._page_of[name] in self._free

    def share(self, name: bytes) -> int:
        """Hold a page that is known."""
        page = self._page_of[name]
        self._free.pop(page, None)
        self._holders[page] += 1
        return page

    def publish(self, page: int, name: bytes) -> None:
        """Let others find a page that is full, or will be before they read it. The first of equal ones stays."""
        if name not in self._page_of:
            self._page_of[name] = page
            self._hash_of[page] = name

    def release(self, pages: Iterable[int]) -> None:
        """Let go, the last page first, so that the beginnings of texts live longest."""
        for page in reversed([page for page in pages if page != NOBODY]):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None

    def forget(self) -> None:
        """Know no page any more: weights have changed. Those that are held stay with their holders."""
        self._page_of.clear()
        self._hash_of.clear()


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page: of its tokens and all that came before."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()
