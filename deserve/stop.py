"""Ending a job early: signals and the time limit."""

import signal
import time
from types import FrameType

STOPPED = 75  # exit status of a job that was stopped and can be resumed (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Whether the job is to end early. On a signal, or when `time_limit_s` is over, nothing new is begun; sequences
    in flight may finish for most of `grace_s`, and what is left then is dropped, to be answered by a resumed job.

    Every rank takes the signals, as they are sent to all; rank 0 acts on them and the others follow its plans.
    """

    def __init__(self, grace_s: float, time_limit_s: float | None):
        self._grace_s = grace_s
        self._limit = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._signalled_at: float | None = None
        self._by = ""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            self._by = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why the job is to end early, None as long as it is not."""
        if self._signalled_at is None and self._limit is not None and time.monotonic() >= self._limit:
            self._signalled_at, self._by = self._limit, "time_limit_s"
        return self._by or None

    @property
    def overdue(self) -> bool:
        """Whether what is still in flight is to be dropped; a fifth of the grace is left for the last visits."""
        return self._signalled_at is not None and time.monotonic() > self._signalled_at + 0.8 * self._grace_s

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
