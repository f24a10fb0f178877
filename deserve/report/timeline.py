"""Where a rank's time went: spans of its visits, summed up always, kept one by one when a trace is wanted."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Span(NamedTuple):
    """`kind` of work on `micro_batch` from `begin` to `end` (CLOCK_MONOTONIC, ns)."""

    kind: str
    micro_batch: int
    begin: int
    end: int


class Timeline:
    """A rank's spans. `totals` holds seconds by kind; `first` and `last` bound the run (CLOCK_MONOTONIC, ns)."""

    def __init__(self, keep: bool):
        self.spans: list[Span] | None = [] if keep else None
        self.totals: dict[str, float] = defaultdict(float)
        self.visits = 0
        self.first = self.last = 0

    @contextmanager
    def span(self, kind: str, micro_batch: int) -> Iterator[None]:
        """Time the body as `kind` of work on `micro_batch`."""
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            end = time.monotonic_ns()
            self.totals[kind] += (end - begin) / 1e9
            self.first = self.first or begin
            self.last = end
            if self.spans is not None:
                self.spans.append(Span(kind, micro_batch, begin, end))

    def held(self, micro_batch: int, seconds: float) -> None:
        """The last `seconds` until now, the simulated network held a frame of `micro_batch` back."""
        if not seconds:
            return
        self.totals["held"] += seconds
        if self.spans is not None:
            now = time.monotonic_ns()
            self.spans.append(Span("held", micro_batch, now - round(seconds * 1e9), now))

    @property
    def elapsed_s(self) -> float:
        """Seconds from the first span's begin to the last one's end."""
        return (self.last - self.first) / 1e9
