"""Ending a job early: signals to any rank, the death of its torchrun, and the time limit."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from types import FrameType

import torch.distributed as dist

from deserve.comm.pulse import QUIT, STOP, Word
from deserve.comm.world import World

STOPPED = 75  # exit status of a job that was stopped and can be resumed (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ORPHANED, TIME_LIMIT = 0, -1  # causes of a stop that are no signals
LOOK_EVERY_S = 1.0  # whether the parent process is alive


class Stop:
    """Whether the job is to end early: `reason` says why, None as long as it is not.

    What stops any rank stops all: they tell each other by the pulse, and rank 0 decides how. Before `begin_visits` all
    processes end at once, with status `STOPPED`. After it nothing new is begun; sequences in flight may finish for most
    of `grace_s`, and what is left then is dropped, to be answered by a resumed job.
    """

    def __init__(self, world: World, grace_s: float, time_limit_s: float | None):
        """`time_limit_s`: None where another rank watches it."""
        self.reason: str | None = None
        self._world, self._grace_s = world, grace_s
        self._limit = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._since = 0.0
        self._visiting = self._quitting = False
        self._lock = threading.Lock()
        # A launcher of one's own may end before the ranks that it has started; torchrun never does.
        self._parent = os.getppid() if dist.is_torchelastic_launched() else None
        # Python runs a handler only between two steps of the main thread, which may be loading a checkpoint for
        # minutes. The byte that it writes at once, whatever the main thread does, wakes a thread.
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        taken = [number for number in SIGNALS if not _under_nohup(number)]
        self._before = {number: signal.signal(number, _note) for number in taken}
        world.on_word(self._hear)
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()

    def begin_visits(self) -> None:
        """From now on a stop waits for sequences in flight. Rank 0 calls it, before any rank can begin a visit."""
        with self._lock:
            self._visiting = not self._quitting
        if self._quitting:
            threading.Event().wait()  # for the end of the process

    @property
    def overdue(self) -> bool:
        """Whether what is still in flight is to be dropped; a fifth of the grace is left for the last visits."""
        return self.reason is not None and time.monotonic() > self._since + 0.8 * self._grace_s

    def _watch(self) -> None:
        while True:
            left = LOOK_EVERY_S if self._limit is None else self._limit - time.monotonic()
            self._signals.settimeout(min(LOOK_EVERY_S, max(0.001, left)))
            try:
                numbers = self._signals.recv(1)
            except TimeoutError:
                if self._parent not in (None, os.getppid()):
                    self._ask(ORPHANED)
                if self._limit is not None and time.monotonic() >= self._limit:
                    self._limit = None
                    self._ask(TIME_LIMIT)
                continue
            if not numbers:
                return
            if numbers[0] in SIGNALS:
                self._ask(numbers[0])

    def _ask(self, cause: int) -> None:
        leave_dead_terminal()
        self._hear(Word(STOP, self._world.rank, cause))

    def _hear(self, word: Word) -> None:
        """A rank wants the job stopped (`STOP`), or rank 0 has decided that all end at once (`QUIT`)."""
        with self._lock:
            if self._quitting or (self.reason is not None and word.kind == STOP):
                return
            self._since, self.reason = time.monotonic(), self._describe(word)
            if self._world.rank == 0 and not self._visiting:
                word = word._replace(kind=QUIT)
            quitting = self._quitting = word.kind == QUIT
        self._world.tell(word)
        if quitting:
            # Not here: this may be a thread of the pulse, whose end `quit` waits for.
            threading.Thread(target=self._world.quit, args=(stopped_line(self.reason), STOPPED), daemon=True).start()

    def _describe(self, word: Word) -> str:
        if word.cause == TIME_LIMIT:
            return "time_limit_s"
        what = "the death of torchrun," if word.cause == ORPHANED else f"{signal.Signals(word.cause).name} to"
        return f"{what} rank {word.rank} on {self._world.hosts[word.rank].name}"

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._wakeup.close()
        self._thread.join()
        self._signals.close()


def stopped_line(reason: str) -> str:
    """What the user reads of a job that `reason` stopped."""
    return f"deserve: stopped by {reason}; the same command resumes it, unfinished answers too"


def leave_dead_terminal(descriptors: Sequence[int] = (1, 2)) -> None:
    """Let output go nowhere, if its terminal was closed: writing to it would be an error."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            try:
                os.write(descriptor, b"")
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _under_nohup(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _note(number: int, frame: FrameType | None) -> None:
    """Nothing: `Stop` reads the number from the descriptor that `set_wakeup_fd` names."""
