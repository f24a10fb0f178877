"""Rank 0's account of pages: who owns which, on the GPU and in the host pool."""

import numpy as np

from deserve.batch import IntArray, Ints
from deserve.kvcache.buddy import BuddyAllocator
from deserve.kvcache.pages import widen
from deserve.scheduler.ids import IdStack


class Pages:
    """The pages of every rank at once, since page ids mean the same everywhere.

    Ids `0..main-1` are main pages, which all rounds share; `main..main+swap-1` are swap pages, of which each round has
    a set of its own under the same ids. A round fills its swap pages before it takes main pages: a swap page serves
    nobody else, a main page may help any round.

    `readers` counts the sequences that read each main page; at 0 it is free. `worst` holds the pages that each round
    needs if all its sequences grow to their end.
    """

    def __init__(self, main: int, swap: int, rounds: int, host_height: int, page_size: int, slots: int):
        self.main, self.swap, self.page_size = main, swap, page_size
        self.host = BuddyAllocator(host_height)
        self.readers = np.zeros(main, np.int32)
        self.worst = np.zeros(rounds, np.int64)
        self._free_main = IdStack(np.arange(main, dtype=np.int32))
        self._free_swap = [IdStack(np.arange(main, main + swap, dtype=np.int32)) for _ in range(rounds)]
        self._table = np.zeros((slots, 16), np.int32)
        self._held = np.zeros(slots, np.int64)
        self._stashed: dict[int, IntArray] = {}  # slot: its host pages
        self._largest = 0  # pages of the largest sequence so far, at its end

    # -- counts

    def count(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    @property
    def reach(self) -> int:
        """Pages that one round can own at most."""
        return self.main + self.swap

    def free(self, round_: int) -> int:
        """Pages that `round_` could take now."""
        return self.free_swap(round_) + self.free_main

    @property
    def free_main(self) -> int:
        """Main pages that nobody reads."""
        return len(self._free_main)

    def free_swap(self, round_: int) -> int:
        """Swap pages of `round_` that no sequence of it owns."""
        return len(self._free_swap[round_])

    def owned(self, slot: int) -> IntArray:
        """The pages of the sequence in `slot`, first tokens first."""
        return self._table[slot, : self._held[slot]]

    def growth(self, slots: Ints, tokens: Ints) -> int:
        """Pages that `slots` [rows] need for `tokens` [rows] tokens, beyond those they own."""
        return int(self._missing(slots, tokens).sum())

    def _missing(self, slots: Ints, tokens: Ints) -> Ints:
        return np.maximum(-(-tokens // self.page_size) - self._held[slots], 0)

    @property
    def all_free(self) -> bool:
        """Whether nobody owns a page."""
        swap_free = all(len(swap) == self.swap for swap in self._free_swap)
        return swap_free and len(self._free_main) == self.main and not self.readers.any() and self.host.all_free

    # -- on the GPU

    def grow(self, round_: int, slots: Ints, tokens: Ints) -> IntArray:
        """Give `slots` [rows] the pages for `tokens` [rows] tokens; as many must be free.

        Returns what that changes in their tables, [n, 3]: slot, index, page.
        """
        missing = self._missing(slots, tokens)
        total = int(missing.sum())
        if not total:
            return np.zeros((0, 3), np.int32)
        swap = self._free_swap[round_]
        from_swap = swap.take(min(total, len(swap)))
        from_main = self._free_main.take(total - len(from_swap))
        self.readers[from_main] = 1
        pages = np.concatenate([from_swap, from_main])
        owners = np.repeat(slots, missing)
        nth = np.arange(total) - np.repeat(np.cumsum(missing) - missing, missing)
        index = np.repeat(self._held[slots], missing) + nth
        self._table = widen(self._table, int(index.max()) + 1)
        self._table[owners, index] = pages
        self._held[slots] += missing
        return np.stack([owners, index, pages], 1).astype(np.int32)

    def release(self, round_: int, slot: int) -> None:
        """Take the pages of `slot` back from `round_`; those that somebody else reads stay."""
        pages = main = self.owned(slot)
        if self.swap:
            main = pages[pages < self.main]
            self._free_swap[round_].give(pages[pages >= self.main])
        left = self.readers[main] - 1
        self.readers[main] = left
        self._free_main.give(main[left == 0])
        self._held[slot] = 0

    def movable(self, slot: int) -> bool:
        """Whether `slot` holds main pages alone, which are the same in every round."""
        return bool((self.owned(slot) < self.main).all())

    # -- in the host pool

    def stash(self, round_: int, slot: int, tokens: int) -> IntArray:
        """Give up the pages of `slot` for host pages that keep its first `tokens` tokens: [n, 2] page, host page.

        The host pool must have room for them.
        """
        used = self.count(tokens)
        host = self._stashed[slot] = self.host.take(used)
        pairs = np.stack([self._table[slot, :used], host], 1).astype(np.int32)
        self.release(round_, slot)
        return pairs

    def restore(self, slot: int) -> IntArray:
        """Give up the host pages of `slot`, which owns as many pages by now: [n, 2] host page, page. Empty if none."""
        host = self._stashed.pop(slot, np.zeros(0, np.int32))
        self.host.give(host)
        return np.stack([host, self._table[slot, : len(host)]], 1).astype(np.int32)

    def forget(self, slot: int) -> None:
        """Free the host pages of `slot`, whose tokens nobody needs."""
        self.host.give(self._stashed.pop(slot, np.zeros(0, np.int32)))

    def stashed(self, slot: int) -> bool:
        """Whether the tokens of `slot` lie in the host pool."""
        return slot in self._stashed

    # -- worst cases

    def expect(self, end: int) -> None:
        """A sequence of up to `end` computed tokens has been admitted."""
        self._largest = max(self._largest, self.count(end))

    def affords(self, round_: int, end: int) -> bool:
        """Whether `round_` may take a sequence of up to `end` computed tokens.

        Should all sequences grow to their end, what does not fit on the GPU must fit in the host pool. They go there
        whole, so room for one more of the largest makes sure that enough of them do.
        """
        worst = self.worst.copy()
        worst[round_] += self.count(end)
        overshoot = self.overshoot(worst)
        return overshoot <= 0 or overshoot + max(self._largest, self.count(end)) <= self.host.free_pages

    def overshoot(self, worst: Ints) -> int:
        """Pages that rounds which need `worst` [rounds] lack on the GPU."""
        return int(np.maximum(worst - self.swap, 0).sum()) - self.main
