"""The swap slab: GPU memory that the swap pages of all rounds share, one round and half the layers at a time.

Every round owns the same page ids, backed by host memory of its own. What a visit writes goes to host memory at once,
token by token, so a page in the slab never has to be saved before another takes its place. And once a layer has
attended, its pages are dead. So the slab has room for half of the layers: a layer of the second half takes the place of
one of the first, and that of the first takes it back for the round whose turn is next, each as soon as the other has
attended. The rounds come in turn, so who is next is known before its plan is.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deserve.batch import IntArray
from deserve.kvcache.blocks import copy_blocks
from deserve.kvcache.pinned import host_memory
from deserve.staging import StagingRing
from deserve.timeline import UNTIMED, Timeline

GAP_BYTES = 1 << 20  # pages that nobody wants are copied along, where a further copy would cost more: 20 us on a bus
STALE = 2  # visits of a round after which a page that it did not read or write is taken for a freed one


@dataclass
class SwapCounters:
    """What swapping moved, and the time that visits stood still for pages that were on their way."""

    bytes_in: int = 0
    bytes_out: int = 0
    waited_s: float = 0.0


class _Visit(NamedTuple):
    """When the layers of a visit had their pages: events on the device."""

    begin: torch.cuda.Event
    loaded: dict[int, torch.cuda.Event]
    end: torch.cuda.Event


class SwapSlab:
    """The swap pages of `layers` layers in `memory` [slots, swap_pages, 2, page_size, kv_heads, head_dim].

    Layer l has slot l % slots. A visit is `enter`, then `await_layer`, attention and `leave_layer` of each layer, with
    `follow` for each of the first layers before another waits for the pages that take their place, and `join`; then
    `leave` with the round of the next visit. On a GPU all of these only enqueue work, and what stands between `enter`
    and `leave`, except for `follow`, can be captured in CUDA graphs. Pages count from the slab's first.
    """

    def __init__(self, memory: torch.Tensor, layers: int, rounds: int, max_tokens: int):
        self._slots, swap_pages = memory.shape[:2]
        self._layers, self._slab, self._page_size = layers, memory, memory.shape[3]
        self._host = host_memory((rounds, layers, *memory.shape[1:]), memory.dtype, memory.device)
        self._round = -1  # whose pages are in the slab, or on their way
        self._coming = np.zeros(0, np.int64)  # its pages that were brought in before its plan was known
        self._reads: list[tuple[int, int]] = []  # runs of pages that the visit reads
        self._visits = np.zeros(rounds, np.int64)
        self._needed = np.full((rounds, swap_pages), -STALE, np.int64)  # the round's visit that last used the page
        self._page_bytes = memory[0, 0].nbytes
        self._token_bytes = self._page_bytes // (2 * self._page_size)
        self._gap = 1 + GAP_BYTES // self._page_bytes
        self._saved: tuple[torch.Tensor, torch.Tensor] = (torch.zeros(0), torch.zeros(0))  # pages, offsets of tokens
        self._saving = False  # whether saves were begun that no stream has waited for
        self._computes = False  # whether the visit has any tokens
        self._timeline = UNTIMED
        self.counters = SwapCounters()
        self._on_gpu = memory.is_cuda
        if not self._on_gpu:
            return
        self._loads, self._saves = torch.cuda.Stream(memory.device), torch.cuda.Stream(memory.device)
        # External: within a captured graph, too, they order work that is outside. By layer, and by slot.
        self._loaded, self._left = (
            [torch.cuda.Event(external=True) for _ in range(count)] for count in (layers, self._slots)
        )
        for event in (*self._loaded, *self._left):
            event.record()
        self._ring = StagingRing((8 * 4 * max_tokens,))
        # Blocks of a token's keys or values: in the slab, and in the host memory of all rounds.
        self._tokens = torch.full((2, 2, max_tokens), -1, dtype=torch.int64, device=memory.device)
        self._last_loads: dict[int, torch.cuda.Event] = {}  # by layer, for the visit that comes or is
        self._timed: deque[_Visit] = deque()

    def host(self, round_: int) -> torch.Tensor:
        """The host memory of a round's pages [layers, swap_pages, 2, page_size, kv_heads, head_dim].

        The current stream finds in it all that earlier visits wrote, and may write there before `enter`.
        """
        return self._host[round_]

    def enter(
        self,
        round_: int,
        read: IntArray,
        restored: IntArray,
        pages: IntArray,
        offsets: IntArray,
        timeline: Timeline = UNTIMED,
    ) -> None:
        """Begin a visit of `round_` that reads the pages `read`; `restored` are those just written in host memory.

        It writes tokens to `pages` [T] at `offsets` [T] within them; where a token's page is negative, it is none here.
        """
        self._timeline = timeline
        if self._on_gpu:
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
            if len(restored):
                self._loads.wait_stream(torch.cuda.current_stream())
        if round_ != self._round:
            self._take_turns(round_)
        read = np.unique(read)
        here = np.setdiff1d(self._coming, restored)
        self._load(range(self._slots), self._runs(np.setdiff1d(read, here)))
        self._reads = self._runs(read)
        visit = self._visits[round_] = self._visits[round_] + 1
        written = pages[pages >= 0]
        for used in (read, restored, written):
            self._needed[round_, used] = visit
        self._computes = len(pages) > 0
        self.counters.bytes_out += len(written) * 2 * self._token_bytes * self._layers
        self._address(pages, offsets)

    def leave(self, next_round: int | None, timeline: Timeline = UNTIMED) -> None:
        """End the visit. What `next_round` is likely to read comes in behind it; None: nobody comes."""
        self._timeline = timeline
        if self._on_gpu:
            self._time()
        self._computes = False
        self._take_turns(-1 if next_round is None else next_round)
        if next_round is not None:
            self._coming = np.flatnonzero(self._needed[next_round] > self._visits[next_round] - STALE)
            self._load(range(self._slots), self._runs(self._coming))

    def _time(self) -> None:
        if self._computes:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._timed.append(_Visit(self._begin, self._last_loads, end))
        self._last_loads = {}
        while self._timed and self._timed[0].end.query():
            self.counters.waited_s += _waited(self._timed.popleft(), self._layers)

    def _take_turns(self, round_: int) -> None:
        self._round = round_
        self._coming = self._coming[:0]

    # -- layer by layer

    def await_layer(self, layer: int) -> None:
        """The current stream waits for the pages of `layer`."""
        if self._on_gpu:
            self._loaded[layer].wait()

    def leave_layer(self, layer: int, tokens: int) -> None:
        """The current stream has attended `layer` with `tokens` new tokens: save them, and give up its pages."""
        slot = layer % self._slots
        if self._on_gpu:
            self._saving = True
            self._saves.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._saves):
                of, to = self._tokens[0, :, :tokens], self._tokens[1, :, :tokens]
                for part in range(2):  # keys, values
                    copy_blocks(
                        self._host[0, layer : layer + 1],
                        self._slab[slot : slot + 1],
                        to[part],
                        of[part],
                        self._token_bytes,
                    )
                self._left[slot].record()
        elif len(self._saved[0]):
            pages, offsets = self._saved
            self._host[self._round, layer][pages, :, offsets] = self._slab[slot][pages, :, offsets]

    def join(self) -> None:
        """The current stream waits for what `leave_layer` began. Due at the end of a visit and of a CUDA graph."""
        if self._saving:
            self._saving = False
            torch.cuda.current_stream().wait_stream(self._saves)

    def follow(self, span: range) -> None:
        """Bring in what takes the place of the layers of `span`, which the visit has left."""
        self._load(range(span.start + self._slots, min(span.stop + self._slots, self._layers)), self._reads)

    # -- copies

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

    def _runs(self, pages: NDArray[np.int64] | IntArray) -> list[tuple[int, int]]:
        return list(runs_of(pages, self._gap))

    def _load(self, layers: range, runs: list[tuple[int, int]]) -> None:
        """Bring in the `runs` of the present round's pages of `layers`, each once the one before it has left."""
        if not runs or not layers:
            return
        self.counters.bytes_in += sum(stop - start for start, stop in runs) * self._page_bytes * len(layers)
        copies = torch.cuda.stream(self._loads) if self._on_gpu else contextlib.nullcontext()
        with copies, self._timeline.on_device("swap in", self._round):
            for layer in layers:
                slot = layer % self._slots
                if self._on_gpu:
                    self._left[slot].wait()
                for start, stop in runs:
                    self._slab[slot, start:stop].copy_(self._host[self._round, layer, start:stop], non_blocking=True)
                if self._on_gpu:
                    timed = torch.cuda.Event(enable_timing=True)
                    timed.record()  # first: a visit that has waited for the other has this one behind it
                    self._loaded[layer].record()
                    self._last_loads[layer] = timed


def runs_of(pages: NDArray[np.int64] | IntArray, gap: int) -> Iterator[tuple[int, int]]:
    """`pages`, sorted, as ranges that leave out no more than gaps of `gap` pages and wider."""
    if not len(pages):
        return
    breaks = np.flatnonzero(np.diff(pages) > gap)
    starts, ends = pages[[0, *(breaks + 1)]], pages[[*breaks, len(pages) - 1]]
    yield from zip(starts.tolist(), (ends + 1).tolist(), strict=True)


def _waited(visit: _Visit, layers: int) -> float:
    """Seconds for which a visit's `layers` layers waited for their pages, if all take equally long otherwise.

    With L layers of time t, layer l of a visit that ends at e must have had its pages by e - (L - l) * t. The largest t
    for which that holds of all layers is what they take, and the rest of the visit is waiting.
    """
    took = visit.begin.elapsed_time(visit.end) / 1e3
    late = [event.elapsed_time(visit.end) / 1e3 / (layers - layer) for layer, event in visit.loaded.items()]
    return max(0.0, took - layers * min(took / layers, *late)) if late else 0.0
