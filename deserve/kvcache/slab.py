"""The swap slab: GPU memory that the swap pages of all rounds share, one round at a time.

Every round owns the same page ids, backed by host memory of its own. What a visit writes goes to host memory at once,
token by token, so a page in the slab never has to be saved before another round's takes its place. And once a layer has
attended, its pages are dead: those of the round that comes next are brought in, layer by layer, while this visit is
still in its later layers. The rounds come in turn, so who is next is known before its plan is.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deserve.batch import IntArray
from deserve.kvcache.blocks import copy_blocks
from deserve.kvcache.pinned import host_memory
from deserve.report.timeline import Timeline
from deserve.staging import StagingRing, to_device

GAP_BYTES = 1 << 20  # pages that nobody wants are copied along, where a further copy would cost more: 20 us on a bus
STALE = 2  # visits of a round after which a page that it did not read or write is taken for a freed one


class _Visit(NamedTuple):
    """When the layers of a visit had their pages: events on the device."""

    begin: torch.cuda.Event
    loaded: list[torch.cuda.Event]
    end: torch.cuda.Event


class SwapSlab:
    """The swap pages of `layers` [layers, pages, 2, page_size, kv_heads, head_dim]: `swap_pages` from `first` on.

    A visit is `enter`, then for each layer `await_layer`, attention, and `leave_layer`, then `leave` with the round of
    the next visit. On a GPU all of these only enqueue work, and those of the layers can be captured in a CUDA graph.
    Pages count from the slab's first.
    """

    copies = 1  # of the slab in GPU memory

    def __init__(self, layers: torch.Tensor, first: int, swap_pages: int, rounds: int, max_tokens: int):
        self.active = swap_pages > 0 and rounds > 1  # a single round never leaves
        self._slab = layers[:, first : first + swap_pages]
        count, self._page_size = len(layers), layers.shape[3]
        self._host = host_memory((rounds if self.active else 0, *self._slab.shape), layers.dtype, layers.device)
        self._round = -1  # whose pages are in the slab, or on their way
        self._here = np.zeros(swap_pages, bool)  # pages that hold what their owner expects
        self._visits = np.zeros(rounds, np.int64)
        self._needed = np.full((rounds, swap_pages), -STALE, np.int64)  # the round's visit that last used the page
        self._page_bytes = self._slab[0, 0].nbytes if self._slab.numel() else 0
        self._token_bytes = self._page_bytes // (2 * self._page_size)
        self._gap = 1 + GAP_BYTES // max(1, self._page_bytes)
        self._saved: tuple[torch.Tensor, torch.Tensor] = (torch.zeros(0), torch.zeros(0))  # pages, offsets of tokens
        self._computes = False  # whether the visit has any tokens
        self.bytes_in = self.bytes_out = 0
        self.waited_s = 0.0  # time that visits stood still for pages that were on their way
        self._on_gpu = layers.is_cuda and self.active
        if not self._on_gpu:
            return
        self._loads, self._saves = torch.cuda.Stream(layers.device), torch.cuda.Stream(layers.device)
        # External: within a captured graph, too, they order work that is outside.
        self._loaded, self._left = ([torch.cuda.Event(external=True) for _ in range(count)] for _ in range(2))
        for event in (*self._loaded, *self._left):
            event.record()
        self._ring = StagingRing((8 * 4 * max_tokens,))
        # Blocks of a token's keys or values: in the slab, and in the host memory of all rounds.
        self._tokens = torch.full((2, 2, max_tokens), -1, dtype=torch.int64, device=layers.device)
        self._last_loads: dict[int, torch.cuda.Event] = {}  # by layer, for the visit that comes or is
        self._timed: deque[_Visit] = deque()

    def resident(self, pages: IntArray) -> IntArray:
        """Where `pages` lie in GPU memory during the visit that `enter` began."""
        return pages

    def enter(self, round_: int, read: IntArray, pages: IntArray, offsets: IntArray, timeline: Timeline) -> None:
        """Begin a visit of `round_` that reads the pages `read` of earlier visits.

        It writes tokens to `pages` [T] at `offsets` [T] within them; where a token's page is negative, it is none here.
        """
        if not self.active:
            return
        if self._on_gpu:
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        if round_ != self._round:
            self._take_turns(round_)
        read = np.unique(read)
        self._load(read[~self._here[read]], timeline)
        written = pages[pages >= 0]
        self._here[written] = True
        visit = self._visits[round_] = self._visits[round_] + 1
        self._needed[round_, read] = self._needed[round_, written] = visit
        self._computes = len(pages) > 0
        self.bytes_out += len(written) * 2 * self._token_bytes * len(self._slab)
        self._address(pages, offsets)

    def leave(self, next_round: int | None, timeline: Timeline) -> None:
        """End the visit. What `next_round` is likely to read comes in behind it; None: nobody comes."""
        if not self.active:
            return
        if self._on_gpu:
            self._time()
        if next_round is not None and next_round != self._round:
            self._take_turns(next_round)
            used = self._needed[next_round] > self._visits[next_round] - STALE
            self._load(np.flatnonzero(used), timeline)

    def _time(self) -> None:
        if self._computes:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._timed.append(_Visit(self._begin, list(self._last_loads.values()), end))
        else:  # no layer was awaited or left
            for left in self._left:
                left.record()
        self._last_loads = {}
        while self._timed and self._timed[0].end.query():
            self.waited_s += _waited(self._timed.popleft())

    def _take_turns(self, round_: int) -> None:
        self._round = round_
        self._here[:] = False

    # -- layer by layer

    def await_layer(self, layer: int) -> None:
        """The current stream waits for the pages of `layer`."""
        if self._on_gpu:
            self._loaded[layer].wait()

    def leave_layer(self, layer: int, tokens: int) -> None:
        """The current stream has attended `layer` with `tokens` new tokens: save them, and give up its pages."""
        if self._on_gpu:
            self._saves.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._saves):
                of, to = self._tokens[0, :, :tokens], self._tokens[1, :, :tokens]
                for part in range(2):  # keys, values
                    copy_blocks(
                        self._host[0, layer : layer + 1],
                        self._slab[layer : layer + 1],
                        to[part],
                        of[part],
                        self._token_bytes,
                    )
                self._left[layer].record()
        elif len(self._saved[0]):
            pages, offsets = self._saved
            self._host[self._round, layer][pages, :, offsets] = self._slab[layer][pages, :, offsets]

    def join(self) -> None:
        """The current stream waits for what `leave_layer` began. Due after the last layer."""
        if self._on_gpu:
            torch.cuda.current_stream().wait_stream(self._saves)

    # -- copies

    def save_pages(self, pages: IntArray) -> None:
        """Save whole pages of this round, that others than its visits have written."""
        if not len(pages) or not self.active:
            return
        self.bytes_out += len(pages) * self._page_bytes * len(self._slab)
        self._here[pages] = True
        self._needed[self._round, pages] = self._visits[self._round]
        index = torch.from_numpy(pages.astype(np.int64))
        if self._on_gpu:
            index = to_device(index, self._slab.device)
            copy_blocks(self._host[self._round], self._slab, index, index, self._page_bytes)
        else:
            self._host[self._round][:, index] = self._slab[:, index]

    def warm_up(self) -> None:
        """Compile the kernel of `save_pages`."""
        if self._on_gpu:
            nowhere = torch.full((1,), -1, dtype=torch.int64, device=self._slab.device)
            copy_blocks(self._host[0], self._slab, nowhere, nowhere + 1, self._page_bytes)

    def await_all(self) -> None:
        """The current stream waits for the pages of all layers."""
        for layer in range(len(self._slab)):
            self.await_layer(layer)

    def _address(self, pages: IntArray, offsets: IntArray) -> None:
        """Note where the visit's tokens lie in the slab and in host memory."""
        if not self._on_gpu:
            own = pages >= 0
            self._saved = torch.from_numpy(pages[own].astype(np.int64)), torch.from_numpy(offsets[own].astype(np.int64))
            return
        staging = self._ring.next()[0].view(torch.int64).view(self._tokens.shape)
        blocks = staging.numpy()
        blocks[:] = -1
        count, own = len(pages), pages >= 0
        here = pages.astype(np.int64) * 2 * self._page_size + offsets
        there = here + self._round * (self._host[0].numel() // (self._token_bytes // self._slab.element_size()))
        for part in range(2):
            blocks[0, part, :count] = np.where(own, here + part * self._page_size, -1)
            blocks[1, part, :count] = np.where(own, there + part * self._page_size, -1)
        self._tokens.copy_(staging, non_blocking=True)
        self._ring.enqueued()

    def _load(self, pages: NDArray[np.int64] | IntArray, timeline: Timeline) -> None:
        """Bring in `pages` of the present round, each layer once the last visit has left it."""
        if not len(pages):
            return
        self._here[pages] = True
        runs = list(_runs(pages, self._gap))
        self.bytes_in += sum(stop - start for start, stop in runs) * self._page_bytes * len(self._slab)
        copies = torch.cuda.stream(self._loads) if self._on_gpu else contextlib.nullcontext()
        with copies, timeline.on_device("swap in", self._round):
            for layer in range(len(self._slab)):
                if self._on_gpu:
                    self._left[layer].wait()
                for start, stop in runs:
                    self._slab[layer, start:stop].copy_(self._host[self._round, layer, start:stop], non_blocking=True)
                if self._on_gpu:
                    timed = torch.cuda.Event(enable_timing=True)
                    timed.record()  # first: a visit that has waited for the other has this one behind it
                    self._loaded[layer].record()
                    self._last_loads[layer] = timed


def _runs(pages: NDArray[np.int64] | IntArray, gap: int) -> Iterator[tuple[int, int]]:
    """`pages`, sorted, as ranges that leave out no more than gaps of `gap` pages and wider."""
    breaks = np.flatnonzero(np.diff(pages) > gap)
    starts, ends = pages[[0, *(breaks + 1)]], pages[[*breaks, len(pages) - 1]]
    yield from zip(starts.tolist(), (ends + 1).tolist(), strict=True)


def _waited(visit: _Visit) -> float:
    """Seconds for which the layers of a visit waited for their pages, if all layers take equally long otherwise.

    With L layers of time t, layer l of a visit that ends at e must have had its pages by e - (L - l) * t. The largest t
    for which that holds of all layers is what they take, and the rest of the visit is waiting.
    """
    took = visit.begin.elapsed_time(visit.end) / 1e3
    if not visit.loaded:
        return 0.0
    layers = len(visit.loaded)
    late = [event.elapsed_time(visit.end) / 1e3 / (layers - layer) for layer, event in enumerate(visit.loaded)]
    return max(0.0, took - layers * min(took / layers, *late))
