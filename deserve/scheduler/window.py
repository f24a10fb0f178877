"""The requests that were read ahead: which share their beginning, and which is to be admitted next."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Protocol

from deserve.batch import IntArray, Request, shared_tokens
from deserve.scheduler.prefixes import Chain

SIZE = 4096  # requests that wait in the window, where as many are ready
GROUPS = 8  # prefixes whose readers are admitted side by side
LOOK = 64  # requests that are looked at where others wait for their prefix to be computed


class RequestSource(Protocol):
    """Where the requests come from."""

    def poll(self) -> Request | None:
        """The next request, or None if there is none right now."""

    @property
    def exhausted(self) -> bool:
        """Whether `poll` will never again give a request."""


class Waiting:
    """A request in the window. `number`: its place in the file."""

    def __init__(self, number: int, request: Request, chain: Chain):
        self.number, self.request, self.chain = number, request, chain
        self.key = request.prompt.tobytes(), number


class Window:
    """Up to `size` requests of `source`.

    They are kept sorted by their prompts' tokens, too, so that whoever shares most with a prompt stands next to it.
    `grouped`: who shares most with a request admitted lately comes next. Otherwise all come in the source's order.
    """

    def __init__(
        self, source: RequestSource, chain: Callable[[IntArray], Chain], page_size: int, size: int, grouped: bool
    ):
        """`chain` gives the chain of a prompt."""
        self._source, self._chain, self._page_size, self._size = source, chain, page_size, size
        self._grouped = grouped
        self._waiting: dict[int, Waiting] = {}  # in the source's order
        self._sorted: list[tuple[bytes, int]] = []
        self._numbered = 0
        self._lately: list[Waiting] = []  # admitted, one for each group

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def exhausted(self) -> bool:
        """Whether nothing waits, or ever will."""
        return not self._waiting and self._source.exhausted

    def fill(self) -> None:
        """Take in what is ready."""
        while len(self._waiting) < self._size and (request := self._source.poll()) is not None:
            waiting = Waiting(self._numbered, request, self._chain(request.prompt))
            self._numbered += 1
            self._waiting[waiting.number] = waiting
            insort(self._sorted, waiting.key)

    def candidates(self) -> Iterator[Waiting]:
        """Who may be admitted next, the best first; to be asked again once one is."""
        near = self._nearest() if self._grouped else []
        yield from near
        for waiting in islice(self._waiting.values(), LOOK):
            if waiting not in near:
                yield waiting

    def take(self, waiting: Waiting) -> None:
        """`waiting` is admitted."""
        del self._waiting[waiting.number]
        del self._sorted[bisect_left(self._sorted, waiting.key)]
        if self._grouped:
            # It takes the place of whom it shares most with: their group goes on from here.
            shared = [shared_tokens(waiting.request.prompt, other.request.prompt) for other in self._lately]
            if shared and max(shared) >= self._page_size:
                self._lately.pop(shared.index(max(shared)))
            self._lately = [*self._lately[1 - GROUPS :], waiting]

    def shared_pages(self, waiting: Waiting) -> int:
        """The first pages of `waiting` that somebody else in the window will read, too."""
        return max((shared for _, shared in self._beside(waiting)), default=0) // self._page_size

    def _nearest(self) -> list[Waiting]:
        """Of each group, who shares most with the one admitted last, a page at least; those that share most first."""
        near: list[tuple[Waiting, int]] = []
        groups = []
        for admitted in self._lately:
            if beside := [found for found in self._beside(admitted) if found[1] >= self._page_size]:
                groups.append(admitted)
                near.append(max(beside, key=itemgetter(1)))
        self._lately = groups
        near.sort(key=itemgetter(1), reverse=True)
        return list(dict.fromkeys(waiting for waiting, _ in near))

    def _beside(self, waiting: Waiting) -> list[tuple[Waiting, int]]:
        """The neighbours of `waiting`, itself in the window or not, and the tokens that they share with it.

        A neighbour that does not share the first page is left out.
        """
        at = bisect_left(self._sorted, waiting.key)
        after = at + (at < len(self._sorted) and self._sorted[at] == waiting.key)
        page = waiting.key[0][: waiting.request.prompt.itemsize * self._page_size]
        return [
            (other, shared_tokens(waiting.request.prompt, other.request.prompt))
            for key, number in self._sorted[max(0, at - 1) : at] + self._sorted[after : after + 1]
            if key.startswith(page)
            for other in (self._waiting[number],)
        ]
