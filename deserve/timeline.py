"""Where a rank's time went: spans of its visits, summed up always, kept one by one when a trace is wanted."""

import time
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

SECOND = 1_000_000_000  # ns
BY_SECOND = ("compute", "receive")
PACE_VISITS = 256  # between two reports of how long a rank computes
MOST_SPANS = 500_000  # kept by a rank: what Perfetto still opens at once, minutes to hours of a run


class Span(NamedTuple):
    """`kind` of work on `micro_batch` from `begin` to `end` (CLOCK_MONOTONIC, ns)."""

    kind: str
    micro_batch: int
    begin: int
    end: int


class Frames(Protocol):
    """Where frames come from. `held_s`: the seconds for which the simulated network held the last one back."""

    held_s: float

    def receive(self) -> torch.Tensor:
        """The next frame's payload, uint8 [bytes]."""


class History:
    """Amounts by second since the start."""

    def __init__(self) -> None:
        self._amounts = array("d")

    def add(self, second: int, amount: float) -> None:
        """`amount` more in `second`."""
        if second >= len(self._amounts):
            self._amounts.extend([0.0] * (second + 1 - len(self._amounts)))
        self._amounts[second] += amount

    def __getitem__(self, seconds: slice) -> list[float]:
        """The amounts of `seconds`, as far as there have been some."""
        return self._amounts[seconds].tolist()

    def first(self, seconds: int) -> list[float]:
        """The amounts of the first `seconds` seconds, for JSON."""
        amounts = self[:seconds]
        shown = [int(amount) if amount.is_integer() else round(amount, 4) for amount in amounts]
        return shown + [0] * (seconds - len(shown))


class Timeline:
    """A rank's spans. `totals` holds seconds by kind; `first` and `last` bound the run (CLOCK_MONOTONIC, ns).

    `history` holds, of the kinds in `BY_SECOND`, the share of each second since `first`.

    On a GPU, what the host only launches (`on_device`) is timed by events in the stream, read when they have passed.
    """

    def __init__(self, keep: bool = False, device: torch.device | None = None):
        # Four numbers a span, not objects: those would be gone through at every garbage collection.
        self._kept = array("q")
        self._kinds: dict[str, int] = {}
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.first = self.last = 0
        self.history = {kind: History() for kind in BY_SECOND}
        self.report: Callable[[float], None] = lambda seconds: None  # computed, told after every PACE_VISITS visits
        self._keep = keep
        self._device = device if device is not None and device.type == "cuda" else None
        self._launched: deque[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = deque()
        if self._device is not None:
            self._origin = torch.cuda.Event(enable_timing=True)
            self._origin.record(torch.cuda.current_stream(self._device))
            self._origin.synchronize()
            self._origin_ns = time.monotonic_ns()

    def add(self, kind: str, micro_batch: int, begin: int, end: int) -> None:
        """`kind` of work on `micro_batch` took from `begin` to `end` (CLOCK_MONOTONIC, ns)."""
        self.totals[kind] += (end - begin) / 1e9
        self.counts[kind] += 1
        if kind == "compute" and self.counts[kind] % PACE_VISITS == 0:
            self.report(self.totals[kind])
        self.first = min(self.first or begin, begin)
        self.last = max(self.last, end)
        if kind in self.history:
            at = begin
            while at < end:
                second = max(0, at - self.first) // SECOND
                until = min(end, self.first + (second + 1) * SECOND)
                self.history[kind].add(second, (until - at) / SECOND)
                at = until
        if self._keep and len(self._kept) < 4 * MOST_SPANS:
            self._kept.extend((self._kinds.setdefault(kind, len(self._kinds)), micro_batch, begin, end))

    @contextmanager
    def span(self, kind: str, micro_batch: int) -> Iterator[None]:
        """Time the body, host work, as `kind` of work on `micro_batch`."""
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(kind, micro_batch, begin, time.monotonic_ns())

    @contextmanager
    def on_device(self, kind: str, micro_batch: int) -> Iterator[None]:
        """Time what the body launches on the device's current stream; on a CPU, the body."""
        if self._device is None:
            with self.span(kind, micro_batch):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            self._launched.append((kind, micro_batch, begin, end))
            while self._launched and self._launched[0][3].query():
                self._settle()

    def receive(self, link: Frames, micro_batch: int) -> torch.Tensor:
        """The next frame of `link`, uint8 [bytes]: the wait for it, and what the simulated network added to that."""
        begin = time.monotonic_ns()
        payload = link.receive()
        end = time.monotonic_ns()
        self.add("receive", micro_batch, begin, end)
        if link.held_s:
            self.add("held", micro_batch, max(begin, end - round(link.held_s * 1e9)), end)
        return payload

    @property
    def spans(self) -> list[Span]:
        """The spans that were kept, in the order in which they ended."""
        names = list(self._kinds)
        numbers = iter(self._kept.tolist())
        return [Span(names[kind], *rest) for kind, *rest in zip(*[numbers] * 4, strict=True)]

    def finish(self) -> None:
        """Wait for what is still under way on the device."""
        while self._launched:
            self._launched[0][3].synchronize()
            self._settle()

    @property
    def elapsed_s(self) -> float:
        """Seconds from the first span's begin to the last one's end."""
        return (self.last - self.first) / 1e9

    def _settle(self) -> None:
        kind, micro_batch, begin, end = self._launched.popleft()
        self.add(
            kind,
            micro_batch,
            *(self._origin_ns + round(1e6 * self._origin.elapsed_time(event)) for event in (begin, end)),
        )


UNTIMED = Timeline()  # for visits that nobody asks about
