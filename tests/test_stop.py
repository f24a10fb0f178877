"""What stops a rank stops all: at once before the first visit, in order after it."""

import os
import pty
import queue
import signal
from collections.abc import Iterator

import pytest

from deserve.comm.host import Host
from deserve.comm.pulse import QUIT, STOP, Word
from deserve.stop import STOPPED, Stop, leave_dead_terminal

HOSTS = [Host(f"boot {rank}", f"host{rank}") for rank in range(5)]


class Ring:
    """Ranks in a ring, played by this process; `quits` gets what each of them says when it ends."""

    def __init__(self, size: int):
        self.worlds = [RingWorld(rank, self) for rank in range(size)]
        self.quits: queue.Queue[tuple[int, str, int]] = queue.Queue()

    def all_quit(self) -> set[str]:
        found = [self.quits.get(timeout=30) for _ in self.worlds]
        assert sorted(rank for rank, _, _ in found) == list(range(len(self.worlds)))
        assert {status for _, _, status in found} == {STOPPED}
        return {message for _, message, _ in found}


class RingWorld:
    def __init__(self, rank: int, ring: Ring):
        self.rank, self.hosts, self._ring = rank, HOSTS, ring

    def on_word(self, act) -> None:
        self.hear = act

    def tell(self, word: Word) -> None:
        size = len(self._ring.worlds)
        for neighbour in {(self.rank - 1) % size, (self.rank + 1) % size} - {self.rank}:
            self._ring.worlds[neighbour].hear(word)

    def quit(self, message: str, status: int) -> None:
        self._ring.quits.put((self.rank, message, status))


@pytest.fixture
def made() -> Iterator[list[Stop]]:
    """Stops, ended in reverse order, as they keep the handlers of those before them; under nohup as without it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stops: list[Stop] = []
    yield stops
    for stop in reversed(stops):
        stop.__exit__()
    signal.signal(signal.SIGHUP, before)


def start(ring: Ring, made: list[Stop], last: int, time_limit_s: float | None = None) -> list[Stop]:
    """The stop of each rank. `last` is made last, and takes the signals of this process."""
    for world in sorted(ring.worlds, key=lambda world: world.rank == last):
        made.append(Stop(world, 10, None if world.rank else time_limit_s))
    return sorted(made, key=lambda stop: stop._world.rank)


def until_stopped(stop: Stop) -> None:
    while stop.reason is None:
        signal.sigtimedwait([], 0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1), (5, 0), (5, 2)])
def test_a_signal_to_any_rank(made: list[Stop], size: int, rank: int, number: signal.Signals) -> None:
    ring = Ring(size)
    stops = start(ring, made, last=rank)
    stops[0].begin_visits()
    os.kill(os.getpid(), number)
    until_stopped(stops[0])
    assert stops[0].reason == f"{number.name} to rank {rank} on host{rank}"
    assert ring.quits.empty() and not stops[0].overdue


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1), (5, 2)])
def test_a_signal_before_the_first_visit_ends_all_ranks_at_once(made: list[Stop], size: int, rank: int) -> None:
    ring = Ring(size)
    start(ring, made, last=rank)
    os.kill(os.getpid(), signal.SIGHUP)
    assert ring.all_quit() == {
        f"deserve: stopped by SIGHUP to rank {rank} on host{rank}; the same command resumes it, unfinished answers too"
    }


def test_one_signal_to_every_rank_has_one_reason(made: list[Stop]) -> None:
    """As torchrun sends it; rank 0 decides, and what others have heard before does not hold up its verdict."""
    ring = Ring(3)
    stops = start(ring, made, last=0)
    for world in reversed(ring.worlds):
        world.hear(Word(STOP, world.rank, signal.SIGTERM))
    assert len(ring.all_quit()) == 1
    ring.worlds[1].hear(Word(QUIT, 0, signal.SIGTERM))  # late
    assert ring.quits.empty() and stops[0].reason == stops[1].reason == stops[2].reason


@pytest.mark.parametrize("visiting", [False, True])
def test_the_time_limit(made: list[Stop], visiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deserve.stop.LOOK_EVERY_S", 0.01)
    ring = Ring(2)
    stops = start(ring, made, last=0, time_limit_s=0 if not visiting else 3600)
    if visiting:
        stops[0].begin_visits()
        stops[0]._limit = 0.0  # the hour is over
        until_stopped(stops[0])
        assert stops[0].reason == "time_limit_s" and ring.quits.empty()
    else:
        assert ring.all_quit() == {
            "deserve: stopped by time_limit_s; the same command resumes it, unfinished answers too"
        }


def test_nohup_holds(made: list[Stop]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ring = Ring(1)
        (stop,) = start(ring, made, last=0)
        stop.begin_visits()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGUSR1)
        until_stopped(stop)
        assert stop.reason == "SIGUSR1 to rank 0 on host0"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_whose_torchrun_is_gone(made: list[Stop], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr("deserve.stop.LOOK_EVERY_S", 0.01)
    ring = Ring(2)
    stops = start(ring, made, last=1)
    stops[0].begin_visits()
    assert stops[0].reason is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    until_stopped(stops[0])
    assert stops[0].reason.startswith("the death of torchrun, rank ")


def test_output_to_a_closed_terminal_goes_nowhere() -> None:
    master, terminal = pty.openpty()
    reading, pipe = os.pipe()
    os.close(master)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(terminal, b"progress")
    leave_dead_terminal([terminal, pipe])
    os.write(terminal, b"progress")
    os.write(pipe, b"kept")
    assert os.read(reading, 9) == b"kept"
    for descriptor in (terminal, pipe, reading):
        os.close(descriptor)
