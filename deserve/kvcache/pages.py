"""A stage's KV memory: the pages of its layers, and which of them each sequence owns."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from deserve.batch import IntArray, VisitPlan
from deserve.kvcache.blocks import copy_blocks
from deserve.kvcache.pinned import host_memory
from deserve.kvcache.slab import SwapCounters, SwapSlab
from deserve.kvcache.spec import KVSpec
from deserve.layout import slab_slots
from deserve.staging import to_device
from deserve.timeline import UNTIMED, Timeline


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


class KVLayer(NamedTuple):
    """One layer's KV memory, as attention reads and writes it."""

    memory: torch.Tensor  # [pages, 2, page_size, kv_heads, head_dim]
    table: int  # which of the page tables that `begin_visit` returns indexes `memory`


class KVPages:
    """The KV memory of a stage's layers on `device`: main pages and the slab of swap pages; and the host pool.

    Memory is zeroed, since a masked key is multiplied by a weight of 0 and so must be finite. One more page of each
    layer, the scratch page, belongs to no sequence; padding rows write to it.

    Only this class knows where a page lies. Two layers that share a slot of the slab lie on either side of it,

        main pages of layer l | swap pages, scratch page | main pages of layer l + slots

    so each of them is one block of memory, indexed by a page table that all layers on the same side share. The layers
    `sliding` have none of these pages, but sliding pages: they stay on the GPU, and have tables of their own.
    """

    def __init__(
        self,
        spec: KVSpec,
        layers: int,
        *,
        page_size: int,
        main_pages: int,
        device: torch.device,
        swap_pages: int = 0,
        rounds: int = 1,
        host_pages: int = 0,
        max_tokens: int = 0,
        sequences: int = 0,
        sliding: Collection[int] = (),
        sliding_pages: int = 0,
    ):
        """`swap_pages` per round, `host_pages` of the host pool; a visit has up to `max_tokens` tokens.

        `sequences`: how many there can be at once. `sliding`: indices of layers with `sliding_pages`. Raises
        MemoryError or OutOfMemoryError where memory runs short.
        """
        if rounds == 1:  # a single round never leaves
            main_pages, swap_pages = main_pages + swap_pages, 0
        self.page_size, self._main, self._swap = page_size, main_pages, swap_pages
        self._sequences = PageTable(sequences)
        self._sliding = PageTable(sequences) if sliding else None
        whole = [layer for layer in range(layers) if layer not in sliding]
        slots = slab_slots(len(whole)) if swap_pages else len(whole)
        page = spec.page_shape(page_size)
        others = len(whole) * main_pages + slots * (swap_pages + 1)
        pages = others + len(sliding) * (sliding_pages + 1)
        self.memory = torch.zeros(pages, *page, dtype=spec.dtype, device=device)
        stride = main_pages + swap_pages + 1 + (main_pages if slots < len(whole) else 0)

        def blocks(start: int, count: int, length: int, stride: int = stride) -> torch.Tensor:
            """`count` blocks of `length` pages, the first from page `start` on: [count, length, *page]."""
            size, *inner = self.memory.stride()
            return self.memory.as_strided((count, length, *page), (stride * size, size, *inner), start * size)

        before = blocks(0, slots, main_pages + swap_pages + 1)
        behind = blocks(main_pages, len(whole) - slots, swap_pages + 1 + main_pages)
        apart = blocks(others, len(sliding), sliding_pages + 1, sliding_pages + 1)
        # From this layer on, pages take the place of the first layers'.
        self.turn = whole[slots] if slots < len(whole) else 0
        placed = [KVLayer(memory, table) for table, side in enumerate((before, behind)) for memory in side]
        layer_of = dict(zip(whole, placed, strict=True))
        apart_table = 1 + (self.turn > 0)
        layer_of |= {layer: KVLayer(memory, apart_table) for layer, memory in zip(sorted(sliding), apart, strict=True)}
        self.layers = [layer_of[layer] for layer in range(layers)]
        self._whole = [layer not in sliding for layer in range(layers)]
        self._before = [0, *accumulate(map(int, self._whole))]  # of the layers with main pages, those before each layer
        self._main_memory = before[:, :main_pages], behind[:, swap_pages + 1 :]
        scratch = self.placed(np.array(main_pages + swap_pages, np.int32))
        self.scratch = [*map(int, scratch), *([sliding_pages] if sliding else [])]  # by table
        swaps = swap_pages > 0 and len(whole) > 0
        self.slab = SwapSlab(before[:, main_pages:-1], len(whole), rounds, max_tokens) if swaps else None
        self.swapped = self.slab.counters if self.slab is not None else SwapCounters()
        self._pool = host_memory((len(whole), host_pages, *page), spec.dtype, device)
        self._on_gpu = self.memory.is_cuda
        if self._on_gpu and host_pages and whole:  # compiles the kernels, which would take seconds amid the visits
            nowhere, somewhere = (torch.full((1,), index, dtype=torch.int64, device=device) for index in (-1, 0))
            for memory in (before, *([self.slab.host(0)] if self.slab is not None else [])):
                for target, source in ((self._pool, memory), (memory, self._pool)):
                    copy_blocks(target[:1], source[:1], nowhere, somewhere, self.memory[0].nbytes)

    def begin_visit(self, plan: VisitPlan, timeline: Timeline = UNTIMED) -> list[IntArray]:
        """Move suspended sequences out and in, copy pages, and bring in the swap pages of the plan's micro-batch.

        Returns the page tables [rows, width] of the plan's rows, wide enough for the longest, by `KVLayer.table`.
        Entries past a row's end, and of sliding pages before the row's window, are any valid page.
        """
        self._sequences.write(plan.page_writes)
        if self._sliding is not None:
            self._sliding.write(plan.sliding_writes)
        if len(plan.stash):
            with timeline.on_device("suspend", plan.micro_batch):
                self._move(plan.micro_batch, plan.stash[:, 0], plan.stash[:, 1], resume=False)
        if len(plan.copies):
            source, target = (to_device(index.astype(np.int64), self.memory.device) for index in plan.copies.T)
            for memory in self._main_memory:
                memory[:, target] = memory[:, source]
        if len(plan.restore):
            with timeline.on_device("resume", plan.micro_batch):
                self._move(plan.micro_batch, plan.restore[:, 1], plan.restore[:, 0], resume=True)
        slots, start = plan.slots, plan.context
        if self.slab is not None:
            read = self._sequences.spans(slots, np.zeros_like(start), start, self.page_size)
            pages, offsets = self._sequences.places(slots, start, plan.new_tokens, self.page_size)
            written = np.maximum(pages - self._main, -1)
            self.slab.enter(
                plan.micro_batch, self._swapped(read), self._swapped(plan.restore[:, 1]), written, offsets, timeline
            )
        width = -(-int((start + plan.new_tokens).max(initial=0)) // self.page_size)
        tables = self.placed(self._sequences.rows(slots, width))
        return tables if self._sliding is None else [*tables, self._sliding.rows(slots, width)]

    def placed(self, pages: IntArray) -> list[IntArray]:
        """Ids of main and swap pages as indices into the layers' memory, by `KVLayer.table`."""
        if not self.turn:
            return [pages]
        return [pages, np.where(pages < self._main, pages + (self._swap + 1), pages - self._main)]

    @contextmanager
    def layer(self, index: int, tokens: int) -> Iterator[KVLayer]:
        """The memory of layer `index`, for the visit's `tokens` tokens to be appended and attended.

        Swap pages have arrived when the current stream begins, and may be replaced when it is done.
        """
        slab = self.slab if self._whole[index] else None
        if slab is not None:
            slab.await_layer(self._before[index])
        yield self.layers[index]
        if slab is not None:
            slab.leave_layer(self._before[index], tokens)

    def follow(self, layers: range) -> None:
        """A visit has gone through `layers`: let the swap pages come in that take the place of theirs.

        To be called once for each layer before `turn`, in order, outside of CUDA graphs, before the layer that waits.
        """
        if self.slab is not None:
            self.slab.follow(range(self._before[layers.start], self._before[layers.stop]))

    def join(self) -> None:
        """The current stream waits for what leaving layers began; due at the end of a visit and of a CUDA graph."""
        if self.slab is not None:
            self.slab.join()

    def end_visit(self, next_micro_batch: int | None, timeline: Timeline = UNTIMED) -> None:
        """The visit has been computed, or enqueued; the swap pages of the next one may come in."""
        if self.slab is not None:
            self.slab.leave(next_micro_batch, timeline)

    def _swapped(self, pages: IntArray) -> IntArray:
        """Those of `pages` that are swap pages, counted from the slab's first."""
        return pages[pages >= self._main] - self._main

    def _move(self, round_: int, pages: IntArray, chunk: IntArray, resume: bool) -> None:
        """Copy `pages` of a round to the pages `chunk` of the host pool in all layers, or back.

        Swap pages are taken from the round's host memory, and put there.
        """
        main = pages < self._main
        slots = len(self._main_memory[0])
        for memory, pool in zip(self._main_memory, (self._pool[:slots], self._pool[slots:]), strict=True):
            self._copy(memory, pages[main], pool, chunk[main], resume)
        if self.slab is not None:
            self._copy(self.slab.host(round_), self._swapped(pages), self._pool, chunk[~main], resume)

    def _copy(self, memory: torch.Tensor, pages: IntArray, pool: torch.Tensor, chunk: IntArray, resume: bool) -> None:
        if not len(pages) or not len(memory):
            return
        here, there = (to_device(index.astype(np.int64), self.memory.device) for index in (pages, chunk))
        target, source, to, of = memory, pool, here, there
        if not resume:
            target, source, to, of = source, target, of, to
        if self._on_gpu:
            copy_blocks(target, source, to, of, self.memory[0].nbytes)
        else:
            target[:, to] = source[:, of]
