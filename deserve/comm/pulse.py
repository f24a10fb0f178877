"""The pulse: neighbours in the ring tell each other that they live, beside all other traffic.

A process that is killed, stopped or cut off falls silent here, however long its visits are; one that computes for
minutes, or whose link is slow, does not, since the pulse has threads and connections of its own.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

BEAT, FAREWELL = 0, 1
PATIENCE = timedelta(days=365)  # in place of Gloo's own timeout


class Pulse:
    """Sends a beat to both neighbours every `timeout_s / 10` seconds (at most 1) and listens to theirs.

    `lost` is called, in a thread, with what happened when a neighbour's connection breaks or it has been silent for
    `timeout_s` seconds. All ranks construct it together.
    """

    def __init__(self, rank: int, size: int, timeout_s: float, lost: Callable[[str], None]):
        self._rank, self._timeout_s, self._lost = rank, timeout_s, lost
        self._group = dist.new_group(backend="gloo")
        self._neighbours = sorted({(rank - 1) % size, (rank + 1) % size} - {rank})
        self._heard = dict.fromkeys(self._neighbours, time.monotonic())
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=self._listen, args=(peer,), name=f"pulse of {peer}", daemon=True)
            for peer in self._neighbours
        ]
        self._threads.append(threading.Thread(target=self._beat, name="pulse", daemon=True))
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Say farewell and wait for the neighbours' own."""
        self._leaving.set()
        for thread in self._threads:
            thread.join()

    def _beat(self) -> None:
        works: deque[dist.Work] = deque()
        left = False
        while not left:
            left = self._leaving.wait(min(1.0, self._timeout_s / 10))
            message = torch.tensor([FAREWELL if left else BEAT])
            for peer in self._neighbours:
                # Not by a timeout of Gloo's: that breaks all connections at once, and the wrong one is blamed.
                if time.monotonic() - self._heard[peer] > self._timeout_s:
                    what = f"has been silent for {self._timeout_s:g} s (comm.timeout_s): it hangs or is cut off"
                    self._lost(f"rank {peer} {what}{self._noticed(peer)}")
                try:
                    work = dist.isend(message, peer, group=self._group)
                except RuntimeError:
                    return  # the listener says why
                assert work is not None
                works.append(work)
            while len(works) > 1000:
                works.popleft()  # read long ago, or somebody would have been found silent
        with contextlib.suppress(RuntimeError):  # a neighbour that has left before
            while works:
                works.popleft().wait(timedelta(seconds=self._timeout_s))

    def _listen(self, peer: int) -> None:
        message = torch.tensor([BEAT])
        while message.item() != FAREWELL:
            try:
                work = dist.irecv(message, peer, group=self._group)
                assert work is not None
                work.wait(PATIENCE)
            except RuntimeError:
                self._lost(f"rank {peer} has closed its connection: its process has ended{self._noticed(peer)}")
                return
            self._heard[peer] = time.monotonic()
        self._heard[peer] = float("inf")  # it need not be heard of again

    def _noticed(self, peer: int) -> str:
        return f"; noticed by rank {self._rank} on link {peer} -> {self._rank}"
