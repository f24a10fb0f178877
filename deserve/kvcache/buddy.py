"""The buddy allocator of the host pool. Source: Knuth, The Art of Computer Programming, vol. 1, section 2.5."""

import numpy as np

from deserve.batch import IntArray


def pool_pages(height: int) -> int:
    """The host pages of a pool with blocks of `height` sizes, 1, 2, 4 and so on; 0: no pool."""
    return 2 ** (height - 1) if height else 0


class BuddyAllocator:
    """Hands out host pages in blocks of powers of two from a pool of `pool_pages(height)` pages.

    A request for n pages gets the largest blocks that make up n exactly, so nothing is lost to rounding up and an
    allocation fails only when fewer than n pages are free.
    """

    def __init__(self, height: int):
        self.pages = pool_pages(height)
        self._free: list[set[int]] = [set() for _ in range(height)]  # by order: starts of free blocks of 2^order
        if height:
            self._free[-1].add(0)
        self.free_pages = self.least_free = self.pages

    @property
    def all_free(self) -> bool:
        return self.free_pages == self.pages

    def take(self, count: int) -> IntArray:
        """`count` pages, in long runs of consecutive ids; there must be as many free."""
        assert count <= self.free_pages
        runs = []
        while count:
            start, order = self._block(count.bit_length() - 1)
            runs.append(np.arange(start, start + (1 << order), dtype=np.int32))
            count -= 1 << order
            self.free_pages -= 1 << order
        self.least_free = min(self.least_free, self.free_pages)
        return np.concatenate(runs) if runs else np.zeros(0, np.int32)

    def _block(self, order: int) -> tuple[int, int]:
        """Start and order of a free block of 2^order pages, split off a larger one, or the largest smaller one."""
        larger = next((o for o in range(order, len(self._free)) if self._free[o]), None)
        if larger is None:
            order = next(o for o in range(min(order, len(self._free)) - 1, -1, -1) if self._free[o])
            larger = order
        start = self._free[larger].pop()
        for half in range(larger - 1, order - 1, -1):
            self._free[half].add(start + (1 << half))
        return start, order

    def give(self, pages: IntArray) -> None:
        """Take back `pages`, in any order, and join neighbours to larger blocks."""
        for page in pages.tolist():
            order = 0
            while order < len(self._free) - 1 and (page ^ (1 << order)) in self._free[order]:
                self._free[order].remove(page ^ (1 << order))
                page &= ~(1 << order)
                order += 1
            self._free[order].add(page)
        self.free_pages += len(pages)
