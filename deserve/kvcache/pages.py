"""A stage's KV memory: the pages of its layers, and which of them each sequence owns."""

import numpy as np
import torch

from deserve.batch import IntArray, StepPlan
from deserve.kvcache.slab import SwapSlab
from deserve.report.timeline import UNTIMED, Timeline


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

    def spans(self, slots: IntArray, begin: IntArray, end: IntArray, page_size: int) -> IntArray:
        """The pages that hold tokens `begin` to `end` [rows] of `slots` [rows], all in one array."""
        first, stop = begin // page_size, -(-end // page_size)
        counts = stop - first
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._pages[np.repeat(slots, counts), np.repeat(first, counts) + nth]


def widen(table: IntArray, width: int) -> IntArray:
    """`table` [rows, columns] with at least `width` columns, doubled so that growth is rare."""
    rows, columns = table.shape
    if width <= columns:
        return table
    wider = np.zeros((rows, max(width, 2 * columns)), table.dtype)
    wider[:, :columns] = table
    return wider


class KVPages:
    """The KV memory of a stage's layers, on `device`: main pages, then the slab of swap pages; and the host pool.

    `layers`: [layers, main_pages + swap_pages + 1, 2, page_size, kv_heads, head_dim]. Zeroed, since a masked key is
    multiplied by a weight of 0 and so must be finite. The last page, `scratch_page`, is no sequence's: it takes what
    the rows write that pad a batch.
    """

    def __init__(
        self,
        layers: int,
        main_pages: int,
        swap_pages: int,
        rounds: int,
        host_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.page_size = page_size
        self._main = main_pages
        shape = (2, page_size, kv_heads, head_dim)
        self.layers = torch.zeros(layers, main_pages + swap_pages + 1, *shape, dtype=dtype, device=device)
        self.scratch_page = main_pages + swap_pages
        self.slab = SwapSlab(self.layers[:, main_pages : self.scratch_page], rounds)
        # Untouched memory costs nothing: the pool's pages become real when the first sequence is suspended to them.
        self._host = torch.empty(layers, host_pages, *shape, dtype=dtype)

    def begin_visit(self, plan: StepPlan, table: PageTable, timeline: Timeline = UNTIMED) -> None:
        """Bring the swap pages of the plan's micro-batch in, and move suspended sequences out and in."""
        start, end = plan.context, plan.context + plan.new_tokens
        kept = table.spans(plan.slots, np.zeros_like(start), start, self.page_size)
        read = [plan.stash[:, 0], np.setdiff1d(kept, plan.restore[:, 1])]
        written = [plan.restore[:, 1], table.spans(plan.slots, start, end, self.page_size)]
        self.slab.enter(plan.micro_batch, self._swap(read), self._swap(written))
        for layer in range(len(self.layers)):
            self.slab.rotate(layer, timeline)
        if len(plan.stash):
            with timeline.on_device("suspend", plan.micro_batch):
                self._stash(plan.stash)
        if len(plan.restore):
            with timeline.on_device("resume", plan.micro_batch):
                self._restore(plan.restore)

    def _swap(self, pages: list[IntArray]) -> IntArray:
        """Those of `pages` that are swap pages, counted from the slab's first."""
        every = np.concatenate(pages)
        return every[every >= self._main] - self._main

    def _stash(self, moves: IntArray) -> None:
        """Copy pages out to the host pool; moves [n, 2]: page, host page."""
        pages, host = torch.from_numpy(moves.astype(np.int64)).unbind(1)
        self._host[:, host] = self.layers[:, pages].to(self._host.device)

    def _restore(self, moves: IntArray) -> None:
        """Copy pages in from the host pool; moves [n, 2]: host page, page."""
        host, pages = torch.from_numpy(moves.astype(np.int64)).unbind(1)
        self.layers[:, pages] = self._host[:, host].to(self.layers.device)
