"""Swapping as the published system does it, to measure against: two slabs, and every visit copies both ways all of one.

While a visit computes on one slab, the other's pages go out to host memory and those of the next round come in. Source:
DeServe, arXiv 2501.14784, section 4.
"""

import numpy as np
import torch

from deserve.batch import IntArray
from deserve.kvcache.pinned import host_memory
from deserve.kvcache.slab import SwapSlab
from deserve.report.timeline import Timeline


class TwoSlabs(SwapSlab):
    """In place of a SwapSlab, on a GPU."""

    copies = 2

    def __init__(self, layers: torch.Tensor, first: int, swap_pages: int, rounds: int, max_tokens: int):
        self.active = swap_pages > 0 and rounds > 1
        self._first, self._pages = first, swap_pages
        self._slabs = [layers[:, first + side * swap_pages :][:, :swap_pages] for side in range(self.copies)]
        shape = (rounds if self.active else 0, *self._slabs[0].shape)
        self._host = host_memory(shape, layers.dtype, layers.device)
        self._round, self._side = -1, 0
        self.bytes_in = self.bytes_out = 0
        self.waited_s = 0.0
        self._in, self._out = torch.cuda.Stream(layers.device), torch.cuda.Stream(layers.device)
        self._loaded = torch.cuda.Event(external=True)
        self._loaded.record()
        self._emptied = [torch.cuda.Event() for _ in self._slabs]

    def resident(self, pages: IntArray) -> IntArray:
        return np.where(pages >= self._first, pages + self._side * self._pages, pages).astype(np.int32)

    def enter(self, round_: int, read: IntArray, pages: IntArray, offsets: IntArray, timeline: Timeline) -> None:
        if self.active and round_ != self._round:
            self._bring(round_, timeline)

    def leave(self, next_round: int | None, timeline: Timeline) -> None:
        if not self.active:
            return
        if self._round >= 0:
            self._out.wait_stream(torch.cuda.current_stream())
            self._out.wait_event(self._loaded)
            with torch.cuda.stream(self._out):
                for there, here in zip(self._host[self._round], self._slabs[self._side], strict=True):
                    there.copy_(here, non_blocking=True)
                self._emptied[self._side].record()
            self.bytes_out += self._slabs[0][0].nbytes * len(self._slabs[0])
        if next_round is not None and next_round != self._round:
            self._bring(next_round, timeline)

    def _bring(self, round_: int, timeline: Timeline) -> None:
        self._side = 1 - self._side
        self._round = round_
        with torch.cuda.stream(self._in), timeline.on_device("swap in", round_):
            self._emptied[self._side].wait()
            for here, there in zip(self._slabs[self._side], self._host[round_], strict=True):
                here.copy_(there, non_blocking=True)
            self._loaded.record()
        self.bytes_in += self._slabs[0][0].nbytes * len(self._slabs[0])

    def await_layer(self, layer: int) -> None:
        if layer == 0:
            self._loaded.wait()

    def await_all(self) -> None:
        self._loaded.wait()

    def leave_layer(self, layer: int, tokens: int) -> None:
        pass

    def join(self) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def save_pages(self, pages: IntArray) -> None:
        pass
