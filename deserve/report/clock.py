"""One clock for the spans of all ranks: rank 0's CLOCK_MONOTONIC."""

import time
from collections.abc import Callable, Sequence

from deserve.comm.world import World
from deserve.timeline import Span

EXCHANGES = 4


def to_rank_0s_clock(world: World, clock: Callable[[], int] = time.monotonic_ns) -> int:
    """What is to be added to this rank's times (ns) to have them by rank 0's clock. Every rank calls it.

    Ranks of rank 0's host add nothing. The first rank of each other host asks rank 0 for the time; half of the
    shortest exchange counts as its way back, so the error is at most half a round trip, and as much as there and back
    differ usually. Drift in the course of the run (some ms an hour) is not corrected.
    Source: Mills, "Internet time synchronization", IEEE Trans. Comm. 39 (1991).
    """
    askers = {host: world.hosts.index(host) for host in dict.fromkeys(world.hosts)}
    own = 0
    for asker in askers.values():
        exchanges = []
        for _ in range(EXCHANGES if asker else 0):
            if world.rank == 0:
                world.receive(asker, "clock/ask")
                world.send(asker, "clock/answer", clock())
            elif world.rank == asker:
                sent = clock()
                world.send(0, "clock/ask", None)
                theirs = world.receive(0, "clock/answer")
                took = clock() - sent
                exchanges.append((took, theirs - sent - took // 2))
        if exchanges:
            own = min(exchanges)[1]
    offsets = world.share("clock/offsets", world.gather("clock/offsets", own))
    return int(offsets[askers[world.hosts[world.rank]]])


def shifted(spans: Sequence[Span], offset_ns: int) -> list[Span]:
    """`spans`, `offset_ns` later."""
    return [Span(kind, batch, begin + offset_ns, end + offset_ns) for kind, batch, begin, end in spans]
