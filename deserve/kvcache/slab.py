"""The swap slab: GPU memory that the swap pages of all rounds share, one round at a time.

Every round owns the same page ids, backed by host memory of its own. When a round's turn comes, layer by layer, the
pages that the round before has written go out and the pages that this one will read come in, into the same place.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from deserve.batch import IntArray
from deserve.report.timeline import UNTIMED, Timeline


class SwapSlab:
    """`slab` [layers, swap_pages, 2, page_size, kv_heads, head_dim], a view of the swap pages of a stage's memory.

    A page is written once and then only read, so a copy in host memory stays good: out go the pages written since
    they came in, in come those that a visit reads and that are not here already.
    """

    def __init__(self, slab: torch.Tensor, rounds: int):
        self._slab = slab
        # Untouched host memory costs nothing, so rounds that never swap take none.
        self._host = torch.empty(rounds, *slab.shape, dtype=slab.dtype)
        self._round = -1  # whose pages are in the slab
        self._here = np.zeros(slab.shape[1], bool)  # pages that hold what their owner expects
        self._written = np.zeros(slab.shape[1], bool)  # pages that the host memory does not hold
        self._leaver = -1
        self._out = self._in = torch.zeros(0, dtype=torch.int64)
        self._page_bytes = slab[0, 0].nbytes * slab.shape[0] if slab.numel() else 0
        self.bytes_in = self.bytes_out = 0

    def enter(self, round_: int, read: IntArray, written: IntArray) -> None:
        """Begin a visit of `round_` that reads the pages `read` of earlier visits and writes the pages `written`.

        Pages count from the slab's first. What is to be moved is decided here, and moved by `rotate`.
        """
        out = np.zeros(0, np.int64)
        self._leaver = self._round
        if round_ != self._round:
            out = np.flatnonzero(self._written)
            self._written[:] = self._here[:] = False
            self._round = round_
        wanted = np.unique(read)
        come = wanted[~self._here[wanted]]
        self._here[come] = True
        self._here[written] = self._written[written] = True
        self._out, self._in = _index(out), _index(come)
        self.bytes_out += len(out) * self._page_bytes
        self.bytes_in += len(come) * self._page_bytes

    def rotate(self, layer: int, timeline: Timeline = UNTIMED) -> None:
        """Move a layer's pages for the visit that `enter` began."""
        if len(self._out):
            with timeline.on_device("swap out", self._leaver):
                self._host[self._leaver, layer, self._out] = self._slab[layer, self._out].to(self._host.device)
        if len(self._in):
            with timeline.on_device("swap in", self._round):
                self._slab[layer, self._in] = self._host[self._round, layer, self._in].to(self._slab.device)


def _index(pages: NDArray[np.int64] | IntArray) -> torch.Tensor:
    return torch.from_numpy(pages.astype(np.int64))
