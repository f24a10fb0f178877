"""The pulse: neighbours in the ring tell each other that they live, beside all other traffic.

A process that is killed, stopped or cut off falls silent here, however long its visits are; one that computes for
minutes, or whose link is slow, does not, since the pulse has threads and connections of its own. It also carries what
all ranks must hear at once, whatever their main threads wait for.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

BEAT, FAREWELL, STOP, QUIT, PACE = range(5)
PATIENCE = timedelta(days=365)  # in place of Gloo's own timeout


class Word(NamedTuple):
    """`kind`: BEAT, FAREWELL, or what `rank` has to say for `cause`: STOP or QUIT (`deserve.stop`).

    The `cause` of a beat is how many visits its sender has made, that of PACE how long `rank` has computed (us).
    """

    kind: int
    rank: int = 0
    cause: int = 0


class Pulse:
    """Sends a beat to both neighbours every `timeout_s / 10` seconds (at most 1) and listens to theirs.

    `names` is what to call each rank, `visits` gives the visits that this one has made. `lost` is called, in a thread,
    with what happened when a neighbour's connection breaks or it has been silent for `timeout_s` seconds; `heard` with
    each STOP, QUIT or PACE that a neighbour tells. All ranks construct it together.
    """

    def __init__(
        self,
        rank: int,
        names: list[str],
        timeout_s: float,
        visits: Callable[[], int],
        lost: Callable[[str], None],
        heard: Callable[[Word], None],
    ):
        size = len(names)
        self._rank, self._names, self._timeout_s, self._visits = rank, names, timeout_s, visits
        self._lost, self._heard = lost, heard
        self._group = dist.new_group(backend="gloo")
        self._neighbours = sorted({(rank - 1) % size, (rank + 1) % size} - {rank})
        self._last_heard = dict.fromkeys(self._neighbours, time.monotonic())
        self._visited = dict.fromkeys(self._neighbours, 0)  # visits that each has made, by its last beat
        self._words: queue.SimpleQueue[Word] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._listen, args=(peer,), name=f"pulse of {peer}", daemon=True)
            for peer in self._neighbours
        ]
        self._threads.append(threading.Thread(target=self._beat, name="pulse", daemon=True))
        for thread in self._threads:
            thread.start()

    def tell(self, word: Word) -> None:
        """Send `word` to both neighbours, at once."""
        self._words.put(word)

    def leave(self, patience_s: float | None = None) -> bool:
        """Say farewell and wait for the neighbours' own, for ever or for `patience_s`. Whether all of them said it."""
        self.tell(Word(FAREWELL))
        deadline = None if patience_s is None else time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _beat(self) -> None:
        works: deque[dist.Work] = deque()
        word = Word(BEAT)
        while word.kind != FAREWELL:
            try:
                word = self._words.get(timeout=min(1.0, self._timeout_s / 10))
            except queue.Empty:
                word = Word(BEAT, self._rank, self._visits())
            message = torch.tensor(word)
            for peer in self._neighbours:
                # Not by a timeout of Gloo's: that breaks all connections at once, and the wrong one is blamed.
                if time.monotonic() - self._last_heard[peer] > self._timeout_s:
                    what = f"has been silent for {self._timeout_s:g} s (comm.timeout_s): it hangs or is cut off"
                    self._lost(f"{self._names[peer]} {what}{self._noticed(peer)}")
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
        message = torch.tensor(Word(BEAT))
        word = Word(BEAT)
        while word.kind != FAREWELL:
            try:
                work = dist.irecv(message, peer, group=self._group)
                assert work is not None
                work.wait(PATIENCE)
            except RuntimeError:
                name = self._names[peer]
                self._lost(f"{name} has closed its connection: its process has ended{self._noticed(peer)}")
                return
            self._last_heard[peer] = time.monotonic()
            word = Word(*message.tolist())
            if word.kind == BEAT:
                self._visited[peer] = word.cause
            elif word.kind in (STOP, QUIT, PACE):
                self._heard(word)
        self._last_heard[peer] = float("inf")  # it need not be heard of again

    def _noticed(self, peer: int) -> str:
        made = self._visited[peer]
        visits = f"after its visit {made:,}" if made else "before its first visit"
        return f", last heard of {visits}; noticed by rank {self._rank} on link {peer} -> {self._rank}"
