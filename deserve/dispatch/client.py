"""A ring's first rank, as it looks to rank 0: it asks for requests and reports what becomes of them."""

import threading
import time
from collections import deque
from collections.abc import Callable

from deserve.batch import Completion, Request
from deserve.comm.link import start_thread
from deserve.dispatch.messages import Outcome, Portion, Report

PACE_S = 0.02  # between two reports: what comes meanwhile shares one
AGAIN_S = 0.05  # after which a ring that got fewer requests than it wants asks again
COUNTS_S = 0.5  # after which tokens are reported by themselves


class Client:
    """The source of a ring's requests, and where its results go.

    It exchanges reports for portions in a thread, so that no visit waits for rank 0. Up to `most` requests are asked
    for, in flight or waiting. An error in the thread goes to `failed`, which ends the job.
    """

    def __init__(self, exchange: Callable[[Report], Portion], most: int, failed: Callable[[BaseException], object]):
        self._exchange, self._most = exchange, most
        self._changed = threading.Condition()
        self._ready: deque[Request] = deque()
        self._outstanding = 0  # requests that this ring has
        self._last = False
        self._report = Report()  # the next one
        self._begun = self._done = 0  # exchanges
        self._thread = start_thread("client", self._run, failed)

    # -- the source of requests

    def poll(self) -> Request | None:
        with self._changed:
            return self._ready.popleft() if self._ready else None

    @property
    def exhausted(self) -> bool:
        with self._changed:
            return self._last and not self._ready

    def wait(self, count: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until `count` requests are ready, no more will come, or the job is `stopped`."""
        with self._changed:
            while not (self._last or len(self._ready) >= count or stopped()):
                self._changed.wait(PACE_S)

    # -- where results go

    def save_due_s(self, checkpoint_s: float) -> float:
        """Copies travel to rank 0, which writes those of all rings: no more often than they must."""
        return checkpoint_s

    def put(self, outcome: Outcome) -> None:
        with self._changed:
            self._report.outcomes.append(outcome)
            self._outstanding -= isinstance(outcome, Completion)
            self._changed.notify_all()

    def tokens(self, count: int, trips: int) -> None:
        with self._changed:
            self._report.tokens += count
            self._report.trips += trips

    def flush(self, timeout_s: float) -> None:
        """The job has failed: wait until rank 0 has all that was put, for `timeout_s` at most."""
        with self._changed:
            self._report.saves = True
            self._changed.notify_all()
            this = self._begun + 1
            self._changed.wait_for(lambda: self._done >= this, timeout_s)

    def close(self) -> None:
        """Report what is left, the last time."""
        with self._changed:
            self._report.closes = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        closes = False
        while not closes:
            with self._changed:
                self._changed.wait_for(self._urgent, AGAIN_S if self._wanted else COUNTS_S)
                report, self._report = self._report, Report()
                report.wants, closes = self._wanted, report.closes
                self._begun += 1
            portion = self._exchange(report)
            with self._changed:
                self._done += 1
                self._ready.extend(portion.requests)
                self._outstanding += len(portion.requests)
                self._last = portion.last
                self._changed.notify_all()
            if not closes:
                time.sleep(PACE_S)

    @property
    def _wanted(self) -> int:
        return 0 if self._last else max(0, self._most - self._outstanding)

    def _urgent(self) -> bool:
        report = self._report
        return bool(report.outcomes) or report.saves or report.closes
