"""Hands the requests of a job to its rings, and takes in what becomes of them. On rank 0."""

import math
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np
import torch.distributed as dist

from deserve.batch import Completion, Key, Request, shared_tokens
from deserve.comm.link import start_thread
from deserve.comm.world import World
from deserve.dispatch.messages import (
    Portion,
    Report,
    decode_portion,
    decode_report,
    encode_portion,
    encode_report,
)
from deserve.report.progress import Progress
from deserve.report.recorder import Recorder
from deserve.scheduler.prefixes import Chain
from deserve.scheduler.window import SIZE, RequestSource, Waiting, Window

RECENT_S = 30.0  # how far back a ring's speed is measured, roughly
TRUSTED_S = 10.0  # as long counts what was predicted of it as much as what is measured
LAST_SAVE_S = 2.0  # for the other rings to report what is in flight when a rank has died
REPORT, PORTION = "report", "portion"


class Ledger:
    """What rank 0 has given to a ring and got back. `predicted`: the ring's speed beside that of the others."""

    def __init__(self, predicted: float):
        self.predicted = predicted
        self.requests: dict[Key, Request] = {}  # that it has
        self.last: Waiting | None = None  # that it was given
        self._given: list[bytes] = []  # the prompts that it was given, sorted
        self.tokens = 0.0  # sampled lately
        self.begun = 0  # tokens of answers that are not complete
        self.totals = {"requests": 0, "output_tokens": 0}
        self.saved = self.closed = False

    def give(self, waiting: Waiting) -> None:
        """It is given `waiting`."""
        self.last = waiting
        self.requests[waiting.request.key] = waiting.request
        insort(self._given, waiting.key[0])
        if len(self._given) > SIZE:  # those between others that are alike are missed least
            self._given = self._given[::2]

    def shared(self, waiting: Waiting) -> int:
        """The first tokens that `waiting` has in common with any prompt that it was given."""
        at = bisect_left(self._given, waiting.key[0])
        near = (np.frombuffer(key, np.int32) for key in self._given[max(0, at - 1) : at + 1])
        return max((shared_tokens(waiting.request.prompt, prompt) for prompt in near), default=0)


class Dispatcher:
    """Each ring gets requests when it asks for them, and near the end so many that all end together.

    A ring never has more than its share, by its speed, of all that is not answered. Of answers that end at
    `max_tokens` what is sampled counts as answered; of others nobody knows how far they are. Where `grouped`, a ring
    is given what shares most with its last request, and what shares more with another ring's requests is left to that
    one while there is anything else. `serve` may be called from a thread for each ring.
    """

    def __init__(
        self,
        requests: RequestSource,
        recorder: Recorder,
        progress: Progress,
        predicted: Sequence[float],
        page_size: int,
        grouped: bool,
    ):
        self._window = Window(requests, lambda request: Chain(request.prompt[:0], page_size), page_size, SIZE, False)
        self._recorder, self._progress = recorder, progress
        self._page_size, self._grouped = page_size, grouped
        self.ledgers = [Ledger(rate / sum(predicted)) for rate in predicted]
        self._changed = threading.Condition()
        self._began = self._aged = time.monotonic()
        self._cut = self._sampled = 0  # answers that ended at `max_tokens`, and tokens of all that are complete

    def serve(self, number: int, report: Report) -> Portion:
        """Take in the report of ring `number`; its next portion."""
        ledger = self.ledgers[number]
        for outcome in report.outcomes:
            self._recorder.put(outcome)
        if report.tokens or report.trips:
            self._progress.tokens(report.tokens, report.trips)
        with self._changed:
            self._count(ledger, report)
            self._window.fill()
            requests = self._portion(ledger, min(report.wants, self._most(ledger)))
            portion = Portion(requests, self._window.exhausted)
        if report.saves and number == 0:
            with self._changed:
                self._changed.wait_for(lambda: all(each.saved or each.closed for each in self.ledgers), LAST_SAVE_S)
            self._recorder.flush(LAST_SAVE_S)
        return portion

    def serve_over(self, world: World, number: int, rank: int, group: dist.ProcessGroup | None) -> None:
        """Serve ring `number`, whose first rank is `rank`, in a thread."""
        ledger = self.ledgers[number]

        def run() -> None:
            while not ledger.closed:
                report = decode_report(world.receive(rank, REPORT, group), ledger.requests)
                world.send(rank, PORTION, encode_portion(self.serve(number, report)), group)

        def failed(error: BaseException) -> None:
            with self._changed:
                ledger.closed = True
                self._changed.notify_all()
            world.end_with(error)

        start_thread(f"ring {number}", run, failed)

    def wait(self) -> None:
        """Wait until all rings have closed."""
        with self._changed:
            self._changed.wait_for(lambda: all(ledger.closed for ledger in self.ledgers))

    def _count(self, ledger: Ledger, report: Report) -> None:
        for outcome in report.outcomes:
            if isinstance(outcome, Completion):
                del ledger.requests[outcome.request.key]
                ledger.totals["requests"] += outcome.request.choice == 0
                sampled = len(outcome.tokens) - len(outcome.request.begun.tokens)
                ledger.totals["output_tokens"] += sampled
                ledger.begun -= sampled
                self._sampled += sampled
                self._cut += outcome.finish_reason == "length"
        ledger.begun += report.tokens
        now = time.monotonic()
        fade = math.exp((self._aged - now) / RECENT_S)
        self._aged = now
        for each in self.ledgers:
            each.tokens *= fade
        ledger.tokens += report.tokens
        ledger.saved |= report.saves
        ledger.closed |= report.closes
        self._changed.notify_all()

    def _most(self, ledger: Ledger) -> int:
        """Requests that the ring of `ledger` may get beside those that it has."""
        undone = len(self._window) + sum(map(self._left, self.ledgers))
        seen = sum(each.tokens for each in self.ledgers)
        trusted = max(1.0, seen) * min(1.0, TRUSTED_S / max(1e-9, self._aged - self._began))
        share = (trusted * ledger.predicted + ledger.tokens) / (trusted + seen)
        return math.ceil(max(1.0, share * undone) - self._left(ledger))

    def _left(self, ledger: Ledger) -> float:
        """Requests' worth of work that the ring of `ledger` has."""
        done = max(0, ledger.begun) * self._cut / max(1, self._sampled)
        return max(0.0, len(ledger.requests) - done)

    def _portion(self, ledger: Ledger, count: int) -> list[Request]:
        requests: list[Request] = []
        while len(requests) < count and (waiting := self._next(ledger)) is not None:
            self._window.take(waiting)
            ledger.give(waiting)
            requests.append(waiting.request)
        return requests

    def _next(self, ledger: Ledger) -> Waiting | None:
        """What the ring of `ledger` is given next, if anything is left."""
        if not self._grouped:
            return next(self._window.by_cost(), None)
        near = [] if ledger.last is None else self._window.beside(ledger.last)
        for waiting, shared in sorted(near, key=lambda found: -found[1]):
            if shared >= self._page_size and not self._leaves(ledger, waiting):
                return waiting
        first = None
        for waiting in self._window.by_cost():
            if not self._leaves(ledger, waiting):
                return waiting
            first = first or waiting
        return first

    def _leaves(self, ledger: Ledger, waiting: Waiting) -> bool:
        """Whether `waiting` shares more pages with what another ring was given."""
        others = (each.shared(waiting) for each in self.ledgers if each is not ledger)
        return max(others, default=0) // self._page_size > ledger.shared(waiting) // self._page_size


def asking(world: World, group: dist.ProcessGroup | None) -> Callable[[Report], Portion]:
    """How the first rank of another ring exchanges reports for portions with rank 0."""

    def exchange(report: Report) -> Portion:
        world.send(0, REPORT, encode_report(report), group)
        return decode_portion(world.receive(0, PORTION, group))

    return exchange
