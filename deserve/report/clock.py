"""One clock for the spans of all ranks: rank 0's CLOCK_MONOTONIC."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deserve.comm.world import World
from deserve.report.timeline import Span

EXCHANGES = 4


def boot_id() -> str:
    """What the processes of a host that share a CLOCK_MONOTONIC have in common, and those of others have not."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def to_rank_0s_clock(world: World, host: str | None = None, clock: Callable[[], int] = time.monotonic_ns) -> int:
    """What is to be added to this rank's times (ns) to have them by rank 0's clock. Every rank calls it.

    Ranks of rank 0's host add nothing. The first rank of each other host asks for the time through the store; half of
    the shortest exchange counts as its way back, so the error is at most half a round trip, and as much as there and
    back differ usually. Drift in the course of the run (some ms an hour) is not corrected.
    Source: Mills, "Internet time synchronization", IEEE Trans. Comm. 39 (1991).
    """
    world.gather("clock/host", host or boot_id())
    hosts = [world.read(f"clock/host/{rank}") for rank in range(world.size)]
    askers = [hosts.index(name) for name in dict.fromkeys(hosts)][1:]
    for asker in askers:
        exchanges = []
        for turn in range(EXCHANGES):
            ask, answer = f"clock/ask/{asker}/{turn}", f"clock/answer/{asker}/{turn}"
            if world.rank == 0:
                world.read(ask)
                world.publish(answer, clock())
            elif world.rank == asker:
                sent = clock()
                world.publish(ask, 0)
                theirs = world.read(answer)
                took = clock() - sent
                exchanges.append((took, theirs - sent - took // 2))
        if exchanges:
            world.publish(f"clock/offset/{hosts[asker]}", min(exchanges)[1])
    mine = hosts[world.rank]
    return 0 if mine == hosts[0] else int(world.read(f"clock/offset/{mine}"))


def shifted(spans: Sequence[Span], offset_ns: int) -> list[Span]:
    """`spans`, `offset_ns` later."""
    return [Span(kind, batch, begin + offset_ns, end + offset_ns) for kind, batch, begin, end in spans]
