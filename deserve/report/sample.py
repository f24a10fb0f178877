"""The state of the scheduler and of rank 0's visits, as it is looked at once a second."""

from dataclasses import dataclass
from typing import Any

from deserve.scheduler.drafts import Drafts
from deserve.scheduler.scheduler import Scheduler
from deserve.timeline import Timeline
from deserve.workload.read_ahead import ReadAhead


@dataclass(frozen=True)
class Sample:
    """`kv_use` and `host_pool_use` are fractions; totals count from the start of the visits."""

    running: int = 0  # sequences in a round
    suspended: int = 0  # sequences that were admitted, and are in no round
    waiting: int = 0  # requests that were read and not admitted
    kv_use: float = 0.0
    host_pool_use: float = 0.0
    prompt_tokens: int = 0  # total, of admitted sequences
    cached_tokens: int = 0  # of these, found in prefix pages
    suspensions: int = 0  # total
    drafted: int = 0  # draft tokens, total
    right: int = 0  # of these
    visits: int = 0  # of rank 0, total
    seconds: tuple[tuple[str, float], ...] = ()  # of rank 0, total by kind of span

    @classmethod
    def of(cls, scheduler: Scheduler, ahead: ReadAhead, drafts: Drafts | None, timeline: Timeline) -> "Sample":
        """The state now. For the thread that plans visits; takes some ten microseconds."""
        pages, suspended = scheduler.pages, scheduler.rounds.waiting
        report: dict[str, Any] = {"drafted": 0, "right": 0} if drafts is None else drafts.report()
        return cls(
            running=scheduler.in_flight - suspended,
            suspended=suspended,
            waiting=scheduler.waiting + ahead.ready,
            kv_use=pages.use,
            host_pool_use=1 - pages.host.free_pages / pages.host.pages if pages.host.pages else 0.0,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            suspensions=scheduler.counters.suspensions,
            drafted=report["drafted"],
            right=report["right"],
            visits=timeline.counts["compute"],
            seconds=tuple(timeline.totals.items()),
        )
