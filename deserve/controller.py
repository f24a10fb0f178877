"""The part of a ring's first rank in the visits: tokens in, plans out."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from deserve.batch import Completion, IntArray, Request, VisitPlan, VisitResult
from deserve.comm.link import Receiver
from deserve.scheduler.scheduler import Scheduler
from deserve.scheduler.window import RequestSource
from deserve.stop import Stop
from deserve.timeline import Timeline
from deserve.tuner import Tuner

LAST_SAVE_S = 2.0  # torchrun starts the ranks again only when all have ended


class Requests(RequestSource, Protocol):
    """Where the requests come from: `ReadAhead`, or rank 0."""

    def wait(self, count: int, stopped: Callable[[], bool]) -> None:
        """Wait until `count` requests are ready, no more will come, or the job is `stopped`."""


class Outcomes(Protocol):
    """Where results go: the `Recorder`, or rank 0."""

    def put(self, outcome: Completion | list[Request]) -> None:
        """Have `outcome` written, or how far the answers in flight have come after all that was put before."""

    def save_due_s(self, checkpoint_s: float) -> float:
        """Seconds from one copy of the answers in flight to the next."""

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was put is written, for `timeout_s` at most: the job has failed."""

    def close(self) -> None:
        """Nothing follows."""


class TokenCounts(Protocol):
    """Who counts the tokens: `Progress`, or rank 0."""

    def tokens(self, count: int, trips: int) -> None:
        """`count` tokens were sampled, in so many `trips` of a sequence round the ring."""


class Controller:
    """Plans each visit from what the last one of the same micro-batch brought back."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokens_in: Receiver,
        requests: Requests,
        outcomes: Outcomes,
        counts: TokenCounts,
        stop: Stop,
        timeline: Timeline,
        tuner: Tuner,
        checkpoint_s: float,
    ):
        """The answers in flight are saved every `checkpoint_s` seconds, sooner where that costs little."""
        self._scheduler, self._tokens_in, self._stop, self._timeline = scheduler, tokens_in, stop, timeline
        self._requests, self._outcomes, self._counts = requests, outcomes, counts
        self._tuner = tuner
        self.planned: Callable[[VisitPlan], object] = lambda plan: None  # who is to be told of each visit
        # Plan the only round's next visit while its last one is under way: its tokens are where they are embedded.
        self.ahead = False
        self._checkpoint_s, self._saved = checkpoint_s, time.monotonic()
        self._deciding = threading.Lock()  # held while the scheduler's state changes
        self._under_way: deque[tuple[int, VisitPlan]] = deque()  # micro-batches whose tokens are to come

    def next_visit(self, micro_batch: int) -> tuple[VisitPlan, IntArray]:
        """Take in the tokens of the micro-batch's last visit and plan its next; token ids [T] for the embedding.

        If the next one is planned ahead, take in those of the visit before: ids may be PENDING.
        """
        self._collect_all(micro_batch, but=int(self.ahead))
        if self._stop.reason is not None:
            self._scheduler.admitting = False
            if self._stop.overdue and self._scheduler.in_flight:
                self._save()
                self._scheduler.abandon()
        elif time.monotonic() - self._saved >= self._outcomes.save_due_s(self._checkpoint_s):
            self._save()
        if not self._scheduler.in_flight and not self._scheduler.waiting and self._scheduler.admitting:
            self._requests.wait(1, lambda: self._stop.reason is not None)  # nothing to do meanwhile
        plan, tokens = self._plan_ahead(micro_batch) or self._plan(micro_batch)
        self.planned(plan)
        self._tokens_in.expect()
        self._under_way.append((micro_batch, plan))
        return plan, tokens

    def _plan_ahead(self, micro_batch: int) -> tuple[VisitPlan, IntArray] | None:
        if not self._awaited(micro_batch):
            return None
        with self._timeline.span("plan", micro_batch), self._deciding:
            return self._scheduler.plan_ahead(micro_batch)

    def _plan(self, micro_batch: int) -> tuple[VisitPlan, IntArray]:
        self._collect_all(micro_batch)
        with self._timeline.span("plan", micro_batch), self._deciding:
            return self._scheduler.plan(micro_batch)

    def _awaited(self, micro_batch: int) -> int:
        """Visits of the micro-batch whose tokens are to come."""
        return sum(micro_batch == visited for visited, _ in self._under_way)

    def _collect_all(self, micro_batch: int, but: int = 0) -> None:
        """Take in the tokens of the micro-batch's visits, `but` of so many, after what micro-batches that have retired
        meanwhile left behind."""
        while self._awaited(micro_batch) > but:
            self._collect()

    def save_now(self) -> None:
        """Save the answers in flight, for the start that follows when another rank has died. Any thread may call it.

        Nothing is planned after it. Takes `LAST_SAVE_S` at most for each of its two steps.
        """
        if self._deciding.acquire(timeout=LAST_SAVE_S):
            self._save()
            self._outcomes.flush(LAST_SAVE_S)

    def _save(self) -> None:
        self._saved = time.monotonic()
        self._outcomes.put(self._scheduler.unfinished())

    def _collect(self) -> None:
        micro_batch, plan = self._under_way.popleft()
        words = self._timeline.receive(self._tokens_in, micro_batch).view(torch.int32).numpy()
        with self._timeline.span("commit", micro_batch), self._deciding:
            before = self._scheduler.output_tokens
            result = VisitResult.decode(words, plan.sampled, plan.scored)
            completions = self._scheduler.commit(micro_batch, result)
            kept = self._scheduler.output_tokens - before
            for completion in completions:
                self._outcomes.put(completion)
            finished = [(len(each.request.prompt), len(each.tokens)) for each in completions]
            prompts = plan.tokens - plan.sampled
            if self._tuner.visited(time.monotonic(), self._scheduler.in_flight, prompts, kept, finished):
                filling = self._tuner.filling
                self._scheduler.fill_by(filling.policy, filling.tokens, filling.rows)
            self._counts.tokens(kept, plan.rows_sampled)

    def close(self) -> None:
        """Take in the empty frames of the last visits."""
        while self._under_way:
            self._collect()
        self._outcomes.close()
