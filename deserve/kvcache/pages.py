"""A stage's KV memory: the pages of its layers, and which of them each sequence owns."""

import numpy as np
import torch

from deserve.batch import IntArray, VisitPlan
from deserve.kvcache.blocks import copy_blocks
from deserve.kvcache.layout import PageLayout
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
    """The KV memory of a stage's layers, on `device`: main pages and the slab of swap pages; and the host pool.

    `layers`: of each layer, memory [pages, 2, page_size, kv_heads, head_dim] from its first main page on, in which its
    pages lie as `layout` says, or where that is None as their ids say. Zeroed, since a masked key is multiplied by a
    weight of 0 and so must be finite. The page `scratch_page` is no sequence's: it takes what the rows write that pad a
    batch.
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
        page = (2, page_size, kv_heads, head_dim)
        if rounds == 1:  # a single round never leaves
            main_pages, swap_pages = main_pages + swap_pages, 0
        self._main = main_pages
        self.scratch_page = main_pages + swap_pages
        self.layout = None
        own, slots = main_pages + 1, 0  # pages of each layer, slots of the slab
        if swap_pages:
            own, slots = main_pages, SwapSlab.slots(layers)
            places = [layers * own + layer % slots * (swap_pages + 1) for layer in range(layers)]
            shifts = tuple(place - layer * own - main_pages for layer, place in enumerate(places))
            self.layout = PageLayout(main_pages, shifts)
        self.memory = torch.zeros(layers * own + slots * (swap_pages + 1), *page, dtype=dtype, device=device)
        self.layers = [self.memory[layer * own :][: None if slots else own] for layer in range(layers)]
        self._main_memory = self.memory[: layers * own].view(layers, own, *page)
        slab = self.memory[layers * own :].view(slots, swap_pages + 1, *page)[:, :swap_pages]
        self.slab = SwapSlab(slab, layers, rounds if swap_pages else 0, max_tokens)
        self._pool = host_memory((layers, host_pages, *page), dtype, device)
        self._on_gpu = self.memory.is_cuda
        if self._on_gpu and host_pages:  # compiles the kernels, which would take seconds amid the visits
            nowhere, somewhere = (torch.full((1,), index, dtype=torch.int64, device=device) for index in (-1, 0))
            for memory in (self._main_memory, *([self.slab.host(0)] if swap_pages else [])):
                for target, source in ((self._pool, memory), (memory, self._pool)):
                    copy_blocks(target, source, nowhere, somewhere, self.memory[0].nbytes)

    def begin_visit(self, plan: VisitPlan, table: PageTable, timeline: Timeline = UNTIMED) -> None:
        """Move suspended sequences out and in, and bring in the swap pages of the plan's micro-batch."""
        if len(plan.stash):
            with timeline.on_device("suspend", plan.micro_batch):
                self._move(plan.micro_batch, plan.stash[:, 0], plan.stash[:, 1], resume=False)
        if len(plan.restore):
            with timeline.on_device("resume", plan.micro_batch):
                self._move(plan.micro_batch, plan.restore[:, 1], plan.restore[:, 0], resume=True)
        if not self.slab.active:
            return
        start = plan.context
        read = table.spans(plan.slots, np.zeros_like(start), start, self.page_size)
        pages, offsets = table.places(plan.slots, start, plan.new_tokens, self.page_size)
        written = np.maximum(pages - self._main, -1)
        self.slab.enter(plan.micro_batch, self._swap(read), self._swap(plan.restore[:, 1]), written, offsets, timeline)

    def resident(self, pages: IntArray) -> IntArray:
        """`pages` of the visit that was begun, as its attention finds them."""
        return self.slab.resident(pages, self._main)

    def end_visit(self, next_micro_batch: int | None, timeline: Timeline = UNTIMED) -> None:
        """The visit has been computed, or enqueued; the swap pages of the next one may come in."""
        self.slab.leave(next_micro_batch, timeline)

    def _swap(self, pages: IntArray) -> IntArray:
        """Those of `pages` that are swap pages, counted from the slab's first."""
        return pages[pages >= self._main] - self._main

    def _move(self, round_: int, pages: IntArray, chunk: IntArray, resume: bool) -> None:
        """Copy `pages` of a round to the pages `chunk` of the host pool in all layers, or back.

        Swap pages are taken from the round's host memory, and put there.
        """
        main = pages < self._main
        self._copy(self._main_memory, pages[main], chunk[main], resume)
        if self.slab.active:
            self._copy(self.slab.host(round_), pages[~main] - self._main, chunk[~main], resume)

    def _copy(self, memory: torch.Tensor, pages: IntArray, chunk: IntArray, resume: bool) -> None:
        if not len(pages):
            return
        here, there = (to_device(index.astype(np.int64), self.memory.device) for index in (pages, chunk))
        target, source, to, of = memory, self._pool, here, there
        if not resume:
            target, source, to, of = source, target, of, to
        if self._on_gpu:
            copy_blocks(target, source, to, of, self.memory[0].nbytes)
        else:
            target[:, to] = source[:, of]
