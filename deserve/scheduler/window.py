"""The requests that were read ahead: which is to be admitted next, by what prompts share and by what they cost.

Sources: BatchLLM (arXiv 2412.03594), BlendServe (arXiv 2411.16102).
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Protocol

from deserve.batch import Request, shared_tokens
from deserve.scheduler.prefixes import Chain

SIZE = 4096  # requests that wait in the window, where as many are ready
GROUPS = 8  # prefixes whose readers are admitted side by side
LOOK = 64  # requests that are looked at where others wait for their prefix to be computed
SLACK = 2.0  # mean prompts that may be admitted beyond as many mean answers, or the other way round
DRIFT = 1.2  # of the ratio of prompt to answer tokens, after which it is told anew which requests are above it
BY_NUMBER = attrgetter("number")


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
        self.prompt, self.answer = len(request.prompt), request.sampling.max_tokens  # tokens


class Window:
    """Up to `size` requests of `source`.

    They are kept sorted by their prompts' tokens, too, so that whoever shares most with a prompt stands next to it.
    `grouped`: who shares most with a request admitted lately comes next. `mixed`: apart from that, prompts and answers
    are admitted in the proportion that they have in the source. Otherwise all come in the source's order.
    """

    def __init__(
        self,
        source: RequestSource,
        chain: Callable[[Request], Chain],
        page_size: int,
        size: int,
        grouped: bool,
        mixed: bool = False,
    ):
        """`chain` gives the chain of a request's prompt."""
        self._source, self._chain, self._page_size, self._size = source, chain, page_size, size
        self._grouped, self._mixed = grouped, mixed
        # In the source's order: requests with more prompt for their answer than usual, and the others.
        self._queues: tuple[dict[int, Waiting], dict[int, Waiting]] = {}, {}
        self._prompts = self._answers = 0  # tokens so far
        self._ratio = 0.0  # of these, by which the queues were told apart
        self._excess = 0.0  # mean prompts admitted beyond as many mean answers
        self._sorted: list[tuple[bytes, int]] = []
        self._numbered = 0
        self._lately: list[Waiting] = []  # admitted, one for each group

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def exhausted(self) -> bool:
        """Whether nothing waits, or ever will."""
        return not self._sorted and self._source.exhausted

    def fill(self) -> None:
        """Take in what is ready."""
        new: list[Waiting] = []
        while len(self._sorted) < self._size and (request := self._source.poll()) is not None:
            waiting = Waiting(self._numbered, request, self._chain(request))
            new.append(waiting)
            self._numbered += 1
            self._prompts, self._answers = self._prompts + waiting.prompt, self._answers + waiting.answer
            insort(self._sorted, waiting.key)
        if not new:
            return
        ratio = self._prompts / self._answers
        if self._mixed and not self._ratio / DRIFT < ratio < self._ratio * DRIFT:
            new = [*merge(*(queue.values() for queue in self._queues), key=BY_NUMBER), *new]
            self._queues, self._ratio = ({}, {}), ratio
        for waiting in new:
            self._queues[waiting.prompt <= self._ratio * waiting.answer][waiting.number] = waiting

    def candidates(self) -> Iterator[Waiting]:
        """Who may be admitted next, the best first; to be asked again once one is."""
        near = self._nearest() if self._grouped else []
        yield from near
        for waiting in self.by_cost():
            if waiting not in near:
                yield waiting

    def by_cost(self) -> Iterator[Waiting]:
        """As they come; if too much was admitted of prompts or of answers, first those that bring more of the other."""
        prompts, answers = (islice(queue.values(), LOOK) for queue in self._queues)
        if abs(self._excess) <= SLACK:
            return islice(merge(prompts, answers, key=BY_NUMBER), LOOK)
        return iter([*answers, *prompts] if self._excess > 0 else [*prompts, *answers])

    def take(self, waiting: Waiting) -> None:
        """`waiting` is admitted."""
        for queue in self._queues:
            queue.pop(waiting.number, None)
        del self._sorted[bisect_left(self._sorted, waiting.key)]
        if self._mixed:
            self._excess += (waiting.prompt / self._prompts - waiting.answer / self._answers) * self._numbered
        if self._grouped:
            # It takes the place of whom it shares most with: their group goes on from here.
            shared = [shared_tokens(waiting.request.prompt, other.request.prompt) for other in self._lately]
            if shared and max(shared) >= self._page_size:
                self._lately.pop(shared.index(max(shared)))
            self._lately = [*self._lately[1 - GROUPS :], waiting]

    def shared_with_others(self, waiting: Waiting) -> int:
        """With how many first tokens of `waiting` somebody else in the window begins, too: a page at least, or 0."""
        shared = max((shared for _, shared in self.beside(waiting)), default=0)
        return shared if shared >= self._page_size else 0

    def _nearest(self) -> list[Waiting]:
        """Of each group, who shares most with the one admitted last, a page at least; those that share most first."""
        near: list[tuple[Waiting, int]] = []
        groups = []
        for admitted in self._lately:
            if beside := [found for found in self.beside(admitted) if found[1] >= self._page_size]:
                groups.append(admitted)
                near.append(max(beside, key=itemgetter(1)))
        self._lately = groups
        near.sort(key=itemgetter(1), reverse=True)
        return list(dict.fromkeys(waiting for waiting, _ in near))

    def beside(self, waiting: Waiting) -> list[tuple[Waiting, int]]:
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
            for other in (self._queues[0].get(number) or self._queues[1][number],)
        ]
