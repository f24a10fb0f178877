"""A simulation of a job, visit by visit: what a plan would bring on ranks and links of known speed.

It follows the scheduler's rules for filling visits and the ring's order of events, but knows only counts and lengths.
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from deserve.kvcache.buddy import pool_pages
from deserve.planner.plan import Plan
from deserve.planner.times import Machine, StageTimes, Work
from deserve.scheduler.policy import POLICIES
from deserve.scheduler.policy import Fill as Kind
from deserve.workload import Lengths

# Rows of a micro-batch's state, one column per sequence.
LENGTH, COMPUTED, LEFT, HELD, AGE, AWAITED = range(6)
# A stretch of visits that only decode is skipped once two cycles in a row took the same time, so many cycles at most.
LONGEST_SKIP = 64
# Waves of a long job that are simulated, all but the first and the last of which are usual ones: at least 3.
WHOLE = 5
# A simulation ends after so many, about a second's worth.
MOST_VISITS = 12_000


@dataclass(frozen=True)
class Outcome:
    """What came of a simulated job."""

    seconds: float
    output_tokens: int
    busy: tuple[float, ...]  # fraction of the time, by rank
    visits: int  # simulated one by one
    suspensions: int

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


def simulate(plan: Plan, lengths: Lengths, machine: Machine, layers: int, whole: int = WHOLE) -> Outcome:
    """The job of `lengths` under `plan`, of a model of `layers` layers, from the first visit to the last token.

    Requests have the mean lengths, unless those of each are known. Of a job of many alike only `whole` waves of
    `plan.concurrency` sequences are simulated, and its last; those between take as long as the usual ones of these
    in the mean. The first and the last are not: waves overlap where prompts and answers mix (`decode_first`), and where
    sequences are suspended a long wave follows a short one.
    """
    wave = plan.concurrency
    count = lengths.count if lengths.count is not None else 10 * wave
    simulated = count if count <= (whole + 1) * wave or lengths.sizes else whole * wave + count % wave
    run = Simulation(plan, lengths, machine, layers, simulated)
    run.run()
    between = 0.0
    output = sum(answer for _, answer in lengths.sizes) or count * run.output
    if run.visits >= MOST_VISITS:  # so long a job goes on as it began
        between = run.now * (output / max(1, run.sampled) - 1)
    elif count > simulated:
        usual = (run.finished_at((whole - 1) * wave) - run.finished_at(wave)) / (whole - 2)
        between = (count - simulated) / wave * usual
    seconds = max(run.now + between, 1e-9)
    busy = tuple(run.busy_of[kind] / max(run.now, 1e-9) for kind in run.kind_of)
    return Outcome(seconds, output, busy, run.visits, run.suspensions)


class Simulation:
    """A job of `count` requests under way: the micro-batches, their pages, and the clocks of ranks and links."""

    def __init__(self, plan: Plan, lengths: Lengths, machine: Machine, layers: int, count: int):
        self.plan, self.machine, self.waiting = plan, machine, count
        self.prompt, self.output = max(1, round(lengths.mean_prompt)), max(1, round(lengths.mean_output))
        self.sizes = lengths.sizes
        self.policy = POLICIES[plan.policy]
        self.batches = [np.zeros((6, 0), np.int64) for _ in range(plan.rounds)]
        self.held = np.zeros(plan.rounds, np.int64)
        self.worst = np.zeros(plan.rounds, np.int64)
        self.host_free = pool_pages(plan.host_height)
        self.largest = 0  # pages of the largest sequence so far, at its end
        self.slots_free = plan.concurrency
        self.suspended: list[tuple[int, ...]] = []  # heap of columns, by age
        self.admissions = self.suspensions = self.visits = self.moved = self.sampled = 0
        self.done: list[tuple[int, float]] = [(0, 0.0)]  # requests finished, by when
        self.now = 0.0
        # The ring: when each rank is free, each link's wire, and when each micro-batch's tokens are back.
        ranks = machine.ranks
        self.free, self.wire = [0.0] * ranks, [0.0] * ranks
        self.planned = 0.0  # when the host of rank 0 had planned its last visit
        self.back = [0.0] * plan.rounds
        shares = [plan.shard(rank, layers) for rank in range(ranks)]
        kinds: dict[tuple[StageTimes, int, bool, bool], int] = {}
        self.kind_of = [
            kinds.setdefault((machine.stages[r], s.last - s.first, s.embeds, s.outputs), len(kinds))
            for r, s in enumerate(shares)
        ]
        self.kinds = list(kinds)
        self.busy_of = [0.0] * len(kinds)
        self.byte_s = [link.byte_s for link in machine.links]
        self.latency_s = [link.latency_s for link in machine.links]

    def run(self) -> None:
        turn = list(range(self.plan.rounds))
        starts: list[tuple[float, list[float]]] = []
        self.eventful = True
        while turn and self.visits < MOST_VISITS:
            for micro_batch in turn:
                self._visit(micro_batch)
            turn = [micro_batch for micro_batch in turn if not self._retired(micro_batch)]
            starts = [] if self.eventful else [*starts, (self.now, self.busy_of.copy())]
            if len(starts) == 4:
                self._skip(starts)
                starts = []
            self.eventful = False

    @property
    def finished(self) -> int:
        """Requests answered so far."""
        return self.done[-1][0]

    def finished_at(self, count: int) -> float:
        """When `count` requests had been finished."""
        return next(time for finished, time in self.done if finished >= count)

    # -- one visit

    def _visit(self, m: int) -> None:
        self.now = max(self.planned if self.machine.stages[0].ahead else self.free[0], self.back[m])
        self.moved = 0
        self._commit(m)
        if self._retired(m):
            return
        if not self._make_room(m):
            self._resume(m)
        work = self._fill(m)
        self.visits += 1
        self._travel(m, work)

    def _retired(self, m: int) -> bool:
        return not self.batches[m].shape[1] and not self.suspended and not self.waiting

    def _commit(self, m: int) -> None:
        batch = self.batches[m]
        self.sampled += int(batch[AWAITED].sum())
        batch[LENGTH] += batch[AWAITED]
        batch[LEFT] -= batch[AWAITED]
        batch[AWAITED] = 0
        done = batch[LEFT] == 0
        finished = int(np.count_nonzero(done))
        if finished:
            self.eventful = True
            self.held[m] -= batch[HELD, done].sum()
            self.worst[m] -= self._worst(batch[:, done]).sum()
            self.batches[m] = batch[:, ~done]
            self.slots_free += finished
            self.done.append((self.done[-1][0] + finished, self.now))

    def _fill(self, m: int) -> Work:
        budget = self.plan.max_batch_tokens
        growth = self._growth(m)
        new = np.zeros(self.batches[m].shape[1], np.int64)
        decodes = decode_kv = prefills = pairs = 0
        for kind in self.policy.order:
            batch = self.batches[m]
            missing = batch[LENGTH] - batch[COMPUTED]
            if kind is Kind.DECODE:
                ready = (missing == 1) & (new == 0)
                candidates = np.flatnonzero(ready)
                taken = candidates[:budget]
                new[taken] = 1
                decodes = len(taken)
                decode_kv = int(batch[LENGTH, taken].sum())
                budget -= decodes
                if decodes < len(ready):  # those that found no place come first the next time
                    order = np.concatenate([np.flatnonzero(~ready), candidates[decodes:], taken])
                    self.batches[m], new = batch[:, order], new[order]
                self.eventful |= decodes < len(candidates)
                continue
            begun = np.flatnonzero(missing > 1).tolist() if kind is Kind.PREFILL else range(len(new), len(new) + budget)
            for index in begun:
                if not budget or (kind is Kind.ADMIT and not self._admit(m, growth)):
                    break
                batch = self.batches[m]
                new = np.append(new, 0) if index == len(new) else new
                count = min(budget, int(batch[LENGTH, index] - batch[COMPUTED, index]))
                new[index] = count
                budget -= count
                prefills += count
                pairs += count * (int(batch[COMPUTED, index]) + count)
                self.eventful = True
                if self.policy.alone:
                    break
            if self.policy.alone and prefills:
                break
        batch = self.batches[m]
        running = new > 0
        wanted = np.where(running, np.maximum(self._pages(batch[LENGTH]), batch[HELD]), batch[HELD])
        self.held[m] += wanted.sum() - batch[HELD].sum()
        batch[HELD] = wanted
        batch[COMPUTED] += new
        batch[AWAITED] = running & (batch[COMPUTED] == batch[LENGTH])
        swapped = min(int(self.held[m]), self.plan.swap_pages) if self.plan.rounds > 1 else 0
        return Work(decodes, decode_kv, prefills, pairs, int(batch[AWAITED].sum()), swapped, self.moved)

    def _admit(self, m: int, growth: int) -> bool:
        batch, plan = self.batches[m], self.plan
        rows = batch.shape[1]
        while self.waiting and self._worst_of_next() > plan.main_pages + plan.swap_pages:  # refused
            self.waiting -= 1
            self.admissions += 1
            self.done.append((self.finished + 1, self.now))
        if not self.waiting or self.suspended or rows >= plan.micro_batch_size or not self.slots_free:
            return False
        prompt, output = self._next()
        now = self._pages(prompt) + growth
        slack = -(-2 * rows // plan.page_size)
        if now + (slack if rows else 0) > self._free(m):
            return False
        worst = self._worst_of_next()
        self.largest = max(self.largest, worst)
        self.worst[m] += worst
        overshoot = int(np.maximum(self.worst - plan.swap_pages, 0).sum()) - plan.main_pages
        if overshoot > 0 and overshoot + self.largest > self.host_free:
            self.worst[m] -= worst
            return False
        self.waiting -= 1
        self.slots_free -= 1
        held = self._pages(prompt)
        self.held[m] += held
        column = np.array([[prompt], [0], [output], [held], [self.admissions], [0]])
        self.batches[m] = np.concatenate([batch, column], 1)
        self.admissions += 1
        return True

    def _next(self) -> tuple[int, int]:
        """Prompt and answer of the next request."""
        return self.sizes[self.admissions] if self.sizes else (self.prompt, self.output)

    # -- pages

    def _worst_of_next(self) -> int:
        """Pages of the next request at its end."""
        return int(self._pages(sum(self._next()) - 1))

    def _pages(self, tokens: Any) -> Any:
        return -(-tokens // self.plan.page_size)

    def _worst(self, columns: Any) -> Any:
        """Pages of sequences at their ends."""
        return self._pages(columns[LENGTH] + columns[LEFT] - 1)

    def _free(self, m: int) -> int:
        swap = self.plan.swap_pages
        main = self.plan.main_pages - int(np.maximum(self.held - swap, 0).sum())
        return main + max(0, swap - int(self.held[m]))

    def _growth(self, m: int) -> int:
        batch = self.batches[m]
        return int(np.maximum(self._pages(batch[LENGTH]) - batch[HELD], 0).sum())

    def _make_room(self, m: int) -> bool:
        crowded = False
        while self._growth(m) > self._free(m):
            batch = self.batches[m]
            victims = np.flatnonzero(batch[AGE] != batch[AGE].min()) if batch.shape[1] > 1 else np.array([0])
            victim = int(victims[np.argmin(batch[COMPUTED, victims])])
            column = batch[:, victim]
            self.host_free -= self._pages(int(column[COMPUTED]))
            self.moved += self._pages(int(column[COMPUTED]))
            self.held[m] -= column[HELD]
            self.worst[m] -= self._worst(column)
            heapq.heappush(self.suspended, (int(column[AGE]), *column.tolist()))
            self.batches[m] = np.delete(batch, victim, 1)
            self.suspensions += 1
            crowded = self.eventful = True
        return crowded

    def _resume(self, m: int) -> None:
        while self.suspended and self.batches[m].shape[1] < self.plan.micro_batch_size:
            column = np.array(self.suspended[0][1:])
            needed = self._pages(int(column[LENGTH])) + self._growth(m) + self.batches[m].shape[1]
            if min(needed, self.plan.main_pages + self.plan.swap_pages) > self._free(m):
                return
            heapq.heappop(self.suspended)
            self.host_free += self._pages(int(column[COMPUTED]))
            self.moved += self._pages(int(column[COMPUTED]))
            column[HELD] = self._pages(int(column[LENGTH]))
            self.held[m] += column[HELD]
            self.worst[m] += self._worst(column)
            self.batches[m] = np.concatenate([self.batches[m], column[:, None]], 1)
            self.eventful = True

    # -- time

    def _travel(self, m: int, work: Work) -> None:
        """The visit's way round the ring: each rank in turn as soon as it is free and the frame is there."""
        machine, free, wire = self.machine, self.free, self.wire
        seconds, copies, delays = zip(
            *(
                (
                    times.seconds(work, layers, first, last, machine.hidden_bytes),
                    times.copies(work, layers),
                    times.delay(work, first, last, machine.hidden_bytes),
                )
                for times, layers, first, last in self.kinds
            ),
            strict=True,
        )
        arrival = self.now
        self.planned = self.now + machine.stages[0].host(work, True, machine.ranks == 1, machine.hidden_bytes)
        frame = machine.frame_bytes(work, 0)
        last = machine.ranks - 1
        for rank, kind in enumerate(self.kind_of):
            begin = max(free[rank], arrival + delays[kind])
            end = begin + seconds[kind]
            free[rank] = max(end, begin + copies[kind])
            if rank == last:
                frame = machine.frame_bytes(work, rank)
            left = max(wire[rank], end) + frame * self.byte_s[rank]
            wire[rank] = left
            arrival = left + self.latency_s[rank]
        for kind, took in enumerate(seconds):
            self.busy_of[kind] += took
        self.back[m] = arrival

    def _skip(self, starts: list[tuple[float, list[float]]]) -> None:
        """Pass over cycles like the last ones. `starts`: when the same visit of each began, and `busy` then."""
        (first, _), (second, busy), (third, _) = starts[-3:]
        before, last = second - first, third - second
        live = [batch for batch in self.batches if batch.shape[1]]
        if self.suspended or not live or abs(last - before) > 0.02 * last:
            return
        cycles = min(LONGEST_SKIP, min(int(batch[LEFT].min()) for batch in live) - 3)
        rows = sum(batch.shape[1] for batch in live)
        spare = self.plan.main_pages - int(np.maximum(self.held - self.plan.swap_pages, 0).sum())
        if int(self.worst.sum()) > self.plan.main_pages:
            cycles = min(cycles, (spare // rows - 1) * self.plan.page_size)
        if cycles < 1:
            return
        passed = cycles * last + (last - before) * cycles * (cycles + 1) / 2
        self.free = [time + passed for time in self.free]
        self.planned += passed
        self.wire = [time + passed for time in self.wire]
        self.back = [time + passed for time in self.back]
        self.busy_of = [time + cycles * (time - then) for time, then in zip(self.busy_of, busy, strict=True)]
        self.sampled += cycles * rows
        for batch in live:
            batch[LENGTH] += cycles
            batch[COMPUTED] += cycles
            batch[LEFT] -= cycles
