"""Free ids, and indices of what rows have."""

import numpy as np

from deserve.batch import IntArray, Ints


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


def spread(slots: Ints, begin: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Slot and index of each of `counts` [rows] tokens or pages from index `begin` [rows] on."""
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(slots, counts), np.repeat(begin, counts) + nth
