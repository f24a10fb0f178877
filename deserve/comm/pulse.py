"""The pulse: neighbours in the ring tell each other that they live, beside all other traffic.

A process that is killed, stopped or cut off falls silent here, however long its visits are; one that computes for
minutes, or whose link is slow, does not, since the pulse has threads and connections of its own.
"""

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

BEAT, FAREWELL = 0, 1


class Pulse:
    """Sends a beat to both neighbours every `timeout_s / 10` seconds (at most 1) and listens to theirs.

    `lost` is called, in a thread, with what happened when a neighbour's connection breaks or it has been silent for
    `timeout_s` seconds. All ranks construct it together.
    """

    def __init__(self, rank: int, size: int, timeout_s: float, lost: Callable[[str], None]):
        self._rank, self._timeout_s, self._lost = rank, timeout_s, lost
        self._group = dist.new_group(backend="gloo")
        self._neighbours = sorted({(rank - 1) % size, (rank + 1) % size} - {rank})
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
        unread: deque[dist.Work] = deque()
        left = False
        while not left:
            left = self._leaving.wait(min(1.0, self._timeout_s / 10))
            message = torch.tensor([FAREWELL if left else BEAT])
            try:
                for peer in self._neighbours:
                    work = dist.isend(message, peer, group=self._group)
                    assert work is not None
                    unread.append(work)
                # A neighbour that has long not read its beats is silent too: our listener will say so.
                while len(unread) > 100 or (left and unread):
                    unread.popleft().wait(timedelta(seconds=self._timeout_s))
            except RuntimeError:
                return

    def _listen(self, peer: int) -> None:
        message = torch.tensor([BEAT])
        while message.item() != FAREWELL:
            try:
                work = dist.irecv(message, peer, group=self._group)
                assert work is not None
                work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as error:
                if "imed out" in str(error):
                    what = f"has been silent for {self._timeout_s:g} s (comm.timeout_s): it hangs or is cut off"
                else:
                    what = "has closed its connection: its process has ended"
                self._lost(f"rank {peer} {what}; noticed by rank {self._rank} on link {peer} -> {self._rank}")
                return
