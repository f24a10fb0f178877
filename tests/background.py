"""Starts the project in the background, for tests that disturb it while it runs."""

import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from launch import ROOT, passive, shared_survey
from results import code, read_results


class Running:
    """A process with all its output in `log`; its job writes into `output`."""

    def __init__(self, command: Sequence[str], output: Path, log: Path, environment: dict[str, str] | None = None):
        self.output, self._log = output, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=passive() | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("deserve: error:")]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank under torchrun. Raises LookupError while there is none."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(number) and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        raise LookupError(number)

    def has_rank(self, number: int, before: psutil.Process | None = None) -> bool:
        """Whether there is one, and not still the process that was it `before`."""
        with contextlib.suppress(LookupError):
            rank = self.rank(number)
            return rank != before and rank.is_running()
        return False

    def until(self, condition: Callable[[], bool], timeout_s: float = 90) -> None:
        """Wait for `condition`, which must come true before the process ends."""
        wait_until(lambda: condition() or self.process.poll() is not None, timeout_s, lambda: self.log)
        assert condition(), f"ended with {self.process.returncode}: {self.log[-3000:]}"

    def kill_when(self, number: int, condition: Callable[[], bool]) -> psutil.Process:
        """Kill a rank while `condition` holds: the rank stands still when that is looked at."""
        rank = self.rank(number)

        def holds() -> bool:
            rank.suspend()
            wait_until(lambda: rank.status() == psutil.STATUS_STOPPED, 90, lambda: self.log)
            if found := condition():
                rank.kill()
            else:
                rank.resume()
            return found

        wait_until(holds, 90, lambda: self.log)
        return rank

    def until_answers(self, count: int, timeout_s: float = 90) -> None:
        """Wait until `count` requests are answered."""
        self.until(lambda: line_count(self.output) >= count, timeout_s)

    def wait(self, timeout_s: float = 90) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.log[-3000:]}") from None

    def end(self) -> None:
        """Kill what is left of it."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
            for process in [psutil.Process(self.process.pid), *children]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.wait()


@contextmanager
def running(
    command: Sequence[str], output: Path, log: Path, environment: dict[str, str] | None = None
) -> Iterator[Running]:
    """`command`, which is gone when the block ends."""
    with shared_survey(command):
        process = Running(command, output, log, environment)
        try:
            yield process
        finally:
            process.end()


def torchrun_command(ranks: int, *overrides: str, restarts: int = 0, launcher: Sequence[str] = ("--standalone",)):
    """A job of `ranks` processes on this host, restarted at most `restarts` times."""
    options = [*launcher, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "deserve.run", *overrides]


def wait_until(condition: Callable[[], bool], timeout_s: float, state: Callable[[], str]) -> None:
    """Poll `condition`; fails with `state()` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {state()[-3000:]}"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody has, below those from which the kernel picks: no other test is given it before it is used."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])


def line_count(output: Path) -> int:
    """How many whole lines of results there are."""
    path = output / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def answers(output: Path) -> dict[str, str]:
    """The text of each request. Every line must be whole, an answer, and the only one of its request."""
    found: dict[str, str] = {}
    for entry in read_results(output):
        assert code(entry) is None and entry["custom_id"] not in found, entry
        found[entry["custom_id"]] = entry["response"]["body"]["choices"][0]["text"]
    return found


def unfinished(output: Path) -> set[str]:
    """The requests whose answers so far are saved."""
    with contextlib.suppress(FileNotFoundError):
        return {json.loads(line)["custom_id"] for line in (output / "unfinished.jsonl").read_bytes().splitlines()[1:]}
    return set()
