"""A stage's KV memory: the pages of its layers, and which of them each sequence owns."""

import numpy as np
import torch

from deserve.batch import IntArray, StepPlan
from deserve.kvcache.blocks import copy_blocks
from deserve.kvcache.pinned import host_memory
from deserve.kvcache.slab import SwapSlab
from deserve.report.timeline import UNTIMED, Timeline
from deserve.staging import to_device


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

    def places(self, slots: IntArray, begin: IntArray, new: IntArray, page_size: int) -> tuple[IntArray, IntArray]:
        """Page and offset in it, [T] each, of `new` [rows] tokens from `begin` [rows] on of `slots` [rows]."""
        row = np.repeat(np.arange(len(slots)), new)
        position = np.arange(len(row)) + (begin - (np.cumsum(new) - new))[row]
        return self._pages[slots[row], position // page_size], (position % page_size).astype(np.int32)


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
        max_tokens: int,
    ):
        self.page_size = page_size
        self._main = main_pages
        shape = (2, page_size, kv_heads, head_dim)
        pages = main_pages + SwapSlab.copies * swap_pages
        self.layers = torch.zeros(layers, pages + 1, *shape, dtype=dtype, device=device)
        self.scratch_page = pages
        self.slab = SwapSlab(self.layers, main_pages, swap_pages, rounds, max_tokens)
        self._host = host_memory((layers, host_pages, *shape), dtype, device)
        if self.layers.is_cuda and host_pages:  # compiles the kernels, which would take seconds amid the visits
            nowhere, somewhere = (torch.full((1,), index, dtype=torch.int64, device=device) for index in (-1, 0))
            for target, source in ((self._host, self.layers), (self.layers, self._host)):
                copy_blocks(target, source, nowhere, somewhere, self.layers[0, 0].nbytes)
            self.slab.warm_up()

    def begin_visit(self, plan: StepPlan, table: PageTable, timeline: Timeline = UNTIMED) -> None:
        """Bring the swap pages of the plan's micro-batch in, and move suspended sequences out and in."""
        start = plan.context
        kept = table.spans(plan.slots, np.zeros_like(start), start, self.page_size)
        read = np.concatenate([plan.stash[:, 0], np.setdiff1d(kept, plan.restore[:, 1])])
        pages, offsets = table.places(plan.slots, start, plan.new_tokens, self.page_size)
        self.slab.enter(plan.micro_batch, self._swap(read), np.maximum(pages - self._main, -1), offsets, timeline)
        if len(plan.stash) or len(plan.restore):
            self.slab.await_all()
        if len(plan.stash):
            with timeline.on_device("suspend", plan.micro_batch):
                self._move(self._host, self.layers, plan.stash[:, 1], self.slab.resident(plan.stash[:, 0]))
        if len(plan.restore):
            with timeline.on_device("resume", plan.micro_batch):
                self._move(self.layers, self._host, self.slab.resident(plan.restore[:, 1]), plan.restore[:, 0])
                self.slab.save_pages(self._swap(plan.restore[:, 1]))

    def end_visit(self, next_micro_batch: int | None, timeline: Timeline = UNTIMED) -> None:
        """The visit has been computed, or enqueued; the swap pages of the next one may come in."""
        self.slab.leave(next_micro_batch, timeline)

    def _swap(self, pages: IntArray) -> IntArray:
        """Those of `pages` that are swap pages, counted from the slab's first."""
        return pages[pages >= self._main] - self._main

    def _move(self, target: torch.Tensor, source: torch.Tensor, to: IntArray, of: IntArray) -> None:
        """Copy the pages `of` of one memory to the pages `to` of the other, in all layers."""
        to_index, of_index = (to_device(index.astype(np.int64), self.layers.device) for index in (to, of))
        if self.layers.is_cuda:
            copy_blocks(target, source, to_index, of_index, self.layers[0, 0].nbytes)
        else:
            target[:, to_index] = source[:, of_index]
