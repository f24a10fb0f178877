"""Sliding pages: those of the layers with a window, of which a sequence holds only what it may still read."""

import numpy as np

from deserve.batch import IntArray, Ints
from deserve.kvcache.pages import widen
from deserve.layout import most_sliding
from deserve.scheduler.ids import IdStack, spread
from deserve.scheduler.prefixes import Chain, Prefixes


class SlidingPages:
    """Rank 0's account of sliding pages, whose ids mean the same on every rank.

    A sequence holds the pages `first` to `stop` (exclusive) of its table. What lies before them has left its window,
    and other sequences may have it. A page is given back once the visit that last reads it has been planned, since all
    ranks execute visits in that order.

    These pages stay on the GPU, also while the sequence waits in the host pool. There is always one left: admission
    reserves for each sequence what it can hold between two visits, and room for the further tokens of one visit.

    Prefix pages are kept as in `Pages`, but by themselves: a sequence can begin behind a prefix only if the pages that
    its window reaches there are held.
    """

    def __init__(self, pages: int, window: int, page_size: int, slots: int, budget: int):
        """`window`: tokens that a token attends to, itself included. `budget`: tokens of a visit, at most."""
        self.pages, self._window, self._page_size = pages, window, page_size
        self._unreserved = self._reservable = pages - budget // page_size
        self._most, self._reach = most_sliding(window, page_size), -(-(window - 1) // page_size)
        self.prefixes = Prefixes(pages, page_size)
        self._free = IdStack(np.arange(pages, dtype=np.int32))
        self.readers = np.zeros(pages, np.int32)
        self._table = np.zeros((slots, 16), np.int32)
        self._first, self._stop, self._reserved = np.zeros((3, slots), np.int64)
        self._adding: dict[int, tuple[Chain, int, int]] = {}  # slot: its chain, and from and up to where it adds pages
        self._writes: list[IntArray] = []

    @property
    def free(self) -> int:
        """Pages that nobody reads."""
        return len(self._free) + self.prefixes.unread

    @property
    def all_free(self) -> bool:
        """Whether nobody holds or has reserved a page."""
        return self.free == self.pages and not self.readers.any() and self._unreserved == self._reservable

    def owned(self, slot: int) -> IntArray:
        """The pages that the sequence in `slot` holds, first tokens first."""
        return self._table[slot, self._first[slot] : self._stop[slot]]

    def take_writes(self) -> IntArray:
        """What changed in the tables since the last call, [n, 3]: slot, index, page."""
        writes, self._writes = self._writes, []
        return np.concatenate([np.zeros((0, 3), np.int32), *writes])

    # -- a sequence's beginning and end

    def affords(self, end: int) -> bool:
        """Whether there is room for a further sequence of up to `end` computed tokens."""
        return self._bound(end) <= self._unreserved

    def _bound(self, end: int) -> int:
        return min(self._most, -(-end // self._page_size))

    def readable(self, chain: Chain, most: int) -> int:
        """Behind how many prefix pages of `chain`, `most` at most, a sequence can begin."""
        run = pages = 0
        for index in range(most):
            run = run + 1 if self.prefixes.page(chain[index]) is not None else 0
            if run >= min(self._reach, index + 1):
                pages = index + 1
        return pages

    def begin(self, slot: int, end: int, chain: Chain, found: int, again: int) -> None:
        """The sequence in `slot`, of up to `end` computed tokens, begins behind `found` prefix pages.

        It adds what it computes of the first `again` pages of `chain` as prefix pages.
        """
        self._reserved[slot] = self._bound(end)
        self._unreserved -= self._bound(end)
        index = np.arange(max(0, found - self._reach), found)
        pages = np.array([self.prefixes.page(chain[each]) for each in index.tolist()], np.int32)
        self.prefixes.take(pages[self.readers[pages] == 0])
        self.readers[pages] += 1
        self._first[slot], self._stop[slot] = found - len(pages), found
        self._write(np.full_like(index, slot), index, pages)
        if found < again:
            self._adding[slot] = chain, found, again

    def release(self, slot: int) -> None:
        """Take the pages of `slot` back, if it holds any, and its reservation."""
        self._give_up(self.owned(slot))
        self._unreserved += int(self._reserved[slot])
        self._first[slot] = self._stop[slot] = self._reserved[slot] = 0
        self._adding.pop(slot, None)

    def forget_prefixes(self) -> None:
        """Forget all prefix pages, of which nobody reads any."""
        self._free.give(self.prefixes.forget())

    # -- a visit

    def computes(self, slot: int, tokens: int) -> None:
        """The visit that is being planned computes the prompt in `slot` up to `tokens` tokens."""
        self.grow(np.array([slot]), np.array([tokens]))
        if slot not in self._adding:
            return
        chain, begin, stop = self._adding.pop(slot)
        end = min(tokens // self._page_size, stop)
        for index in range(begin, end):
            self.prefixes.add(chain, index, int(self._table[slot, index]))
        if end < stop:
            self._adding[slot] = chain, end, stop

    def grow(self, slots: Ints, tokens: Ints) -> None:
        """Give `slots` [rows] the pages up to `tokens` [rows] tokens."""
        missing = np.maximum(-(-tokens // self._page_size) - self._stop[slots], 0)
        total = int(missing.sum())
        if not total:
            return
        short = total - len(self._free)
        if short > 0:
            self._free.give(self.prefixes.evict(short))
        pages = self._free.take(total)
        self.readers[pages] = 1
        self._write(*spread(slots, self._stop[slots], missing), pages)
        self._stop[slots] += missing

    def slide(self, slots: Ints, computed: Ints) -> None:
        """The visit that has been planned computes `slots` [rows] up to `computed` [rows] tokens.

        The next one may compute the last of them again.
        """
        before = self._first[slots]
        first = np.maximum(before, (computed - self._window) // self._page_size)
        self._first[slots] = first
        self._give_up(self._table[spread(slots, before, first - before)])

    def _give_up(self, pages: IntArray) -> None:
        np.subtract.at(self.readers, pages, 1)
        unread = np.unique(pages[self.readers[pages] == 0])
        kept = self.prefixes.held[unread]
        self.prefixes.give_up(unread[kept])
        self._free.give(unread[~kept])

    def _write(self, slots: Ints, index: Ints, pages: IntArray) -> None:
        if len(pages):
            self._table = widen(self._table, int(index.max()) + 1)
            self._table[slots, index] = pages
            self._writes.append(np.stack([slots, index, pages], 1).astype(np.int32))
