"""Swapping as the published system does it, to measure against: two slabs, and every visit copies both ways all of one.

While a visit computes on one slab, the other's pages go out to host memory and those of the next round come in. Source:
DeServe, arXiv 2501.14784, section 4.
"""

import numpy as np
import torch

from deserve.batch import IntArray
from deserve.kvcache.pinned import host_memory
from deserve.kvcache.slab import SwapSlab
from deserve.report.timeline import UNTIMED, Timeline


class TwoSlabs(SwapSlab):
    """In place of a SwapSlab, on a GPU. `memory` [2 * layers, swap_pages, ...]: one slab after the other."""

    @staticmethod
    def slots(layers: int) -> int:
        return 2 * layers

    def __init__(self, memory: torch.Tensor, layers: int, rounds: int, max_tokens: int):
        self.active = memory.shape[1] > 0
        self.spans = [range(layers)]
        self._slabs = memory[:layers], memory[layers:]
        self._side_pages = layers * (memory.stride(0) // memory.stride(1))  # from one slab to the other
        self._host = host_memory((rounds, layers, *memory.shape[1:]), memory.dtype, memory.device)
        self._round, self._side = -1, 0
        self.bytes_in = self.bytes_out = 0
        self.waited_s = 0.0
        self._in, self._out = torch.cuda.Stream(memory.device), torch.cuda.Stream(memory.device)
        self._loaded = torch.cuda.Event(external=True)
        self._loaded.record()
        self._emptied = [torch.cuda.Event() for _ in self._slabs]

    def host(self, round_: int) -> torch.Tensor:
        torch.cuda.current_stream().wait_stream(self._out)
        return self._host[round_]

    def resident(self, pages: IntArray, first: int) -> IntArray:
        return np.where(pages >= first, pages + self._side * self._side_pages, pages).astype(np.int32)

    def enter(
        self,
        round_: int,
        read: IntArray,
        restored: IntArray,
        pages: IntArray,
        offsets: IntArray,
        timeline: Timeline = UNTIMED,
    ) -> None:
        if not self.active:
            return
        if len(restored):  # the slab that is here has what was in host memory before
            self._in.wait_stream(torch.cuda.current_stream())
            self._side, self._round = 1 - self._side, -1
        if round_ != self._round:
            self._bring(round_, timeline)

    def leave(self, next_round: int | None, timeline: Timeline = UNTIMED) -> None:
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

    def leave_layer(self, layer: int, tokens: int) -> None:
        pass

    def join(self) -> None:
        pass

    def follow(self, span: range) -> None:
        pass
