"""A stage's KV memory: the pages of its layers, and which of them each sequence owns."""

import numpy as np
import torch

from deserve.batch import IntArray


class PageTable:
    """The pages of every sequence in flight, by slot. Kept on the host, where the plans arrive."""

    def __init__(self, slots: int):
        self._pages = np.zeros((slots, 16), np.int32)

    def write(self, writes: IntArray) -> None:
        """Apply `writes` [n, 3]: slot, index in the slot's table, page."""
        if not len(writes):
            return
        self._pages = widen(self._pages, int(writes[:, 1].max()) + 1)
        self._pages[writes[:, 0], writes[:, 1]] = writes[:, 2]

    def rows(self, slots: IntArray, width: int) -> IntArray:
        """The first `width` pages of `slots`: [len(slots), width]; entries past a sequence's end are any valid page."""
        return self._pages[slots, :width]


def widen(table: IntArray, width: int) -> IntArray:
    """`table` [rows, columns] with at least `width` columns, doubled so that growth is rare."""
    rows, columns = table.shape
    if width <= columns:
        return table
    wider = np.zeros((rows, max(width, 2 * columns)), table.dtype)
    wider[:, :columns] = table
    return wider


class KVPages:
    """Pages `[pages, 2, page_size, kv_heads, head_dim]` for each of `layers` layers, on `device`, and the host pool.

    Zeroed, since a masked key is multiplied by a weight of 0 and so must be finite.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        host_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.page_size = page_size
        self.pages = pages
        shape = (2, page_size, kv_heads, head_dim)
        self.layers = torch.zeros(layers, pages, *shape, dtype=dtype, device=device)
        # Untouched memory costs nothing: the pool's pages become real when the first sequence is suspended to them.
        self._host = torch.empty(layers, host_pages, *shape, dtype=dtype)

    def stash(self, moves: IntArray) -> None:
        """Copy pages out to the host pool; moves [n, 2]: page, host page."""
        if len(moves):
            pages, host = torch.from_numpy(moves.astype(np.int64)).unbind(1)
            self._host[:, host] = self.layers[:, pages].to(self._host.device)

    def restore(self, moves: IntArray) -> None:
        """Copy pages in from the host pool; moves [n, 2]: host page, page."""
        if len(moves):
            host, pages = torch.from_numpy(moves.astype(np.int64)).unbind(1)
            self.layers[:, pages] = self._host[:, host].to(self.layers.device)
