"""Rank 0's account of pages: which are free, on the GPU and in the host pool."""

import numpy as np

from deserve.batch import IntArray
from deserve.kvcache.buddy import BuddyAllocator


class IdStack:
    """Free ids, the last one given back taken first."""

    def __init__(self, ids: IntArray):
        self._ids = ids[::-1].copy()
        self._top = len(ids)

    def __len__(self) -> int:
        return self._top

    def take(self, count: int) -> IntArray:
        """Remove `count` ids; there must be as many."""
        assert count <= self._top
        self._top -= count
        return self._ids[self._top : self._top + count][::-1].copy()

    def give(self, ids: IntArray) -> None:
        """Put `ids` back."""
        self._ids[self._top : self._top + len(ids)] = ids[::-1]
        self._top += len(ids)


class PageAccount:
    """The pages of every rank at once, since page ids mean the same everywhere.

    Ids `0..main-1` are main pages, which all micro-batches share; `main..main+swap-1` are swap pages, of which each
    micro-batch has a set of its own under the same ids. A micro-batch fills its swap pages before it takes main
    pages: a swap page serves nobody else, a main page may help any round.
    """

    def __init__(self, main: int, swap: int, rounds: int, host: BuddyAllocator):
        self.main, self.swap, self.rounds = main, swap, rounds
        self.host = host
        self._free_main = IdStack(np.arange(main, dtype=np.int32))
        self._free_swap = [IdStack(np.arange(main, main + swap, dtype=np.int32)) for _ in range(rounds)]

    def free(self, micro_batch: int) -> int:
        """Pages that `micro_batch` could take now."""
        return self.free_swap(micro_batch) + self.free_main

    @property
    def free_main(self) -> int:
        """Main pages that nobody owns."""
        return len(self._free_main)

    def free_swap(self, micro_batch: int) -> int:
        """Swap pages of `micro_batch` that no sequence of it owns."""
        return len(self._free_swap[micro_batch])

    @property
    def reach(self) -> int:
        """Pages that one micro-batch can own at most."""
        return self.main + self.swap

    def take(self, micro_batch: int, count: int) -> IntArray:
        """`count` pages for `micro_batch`, swap pages first; there must be as many free."""
        swap = self._free_swap[micro_batch]
        from_swap = swap.take(min(count, len(swap)))
        return np.concatenate([from_swap, self._free_main.take(count - len(from_swap))])

    def give(self, micro_batch: int, pages: IntArray) -> None:
        """Take back `pages` that `micro_batch` owned."""
        self._free_main.give(pages[pages < self.main])
        self._free_swap[micro_batch].give(pages[pages >= self.main])

    @property
    def all_free(self) -> bool:
        """Whether nobody owns a page."""
        swap_free = all(len(swap) == self.swap for swap in self._free_swap)
        return swap_free and len(self._free_main) == self.main and self.host.all_free
