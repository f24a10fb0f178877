"""Rank 0's decisions: which sequences run in a visit, on which pages, and which wait."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deserve.batch import NO_TOKEN, Completion, IntArray, Request, StepPlan
from deserve.kvcache.pages import widen
from deserve.model.sampler import encode_sampling
from deserve.scheduler.accounting import IdStack, PageAccount
from deserve.scheduler.policy import Policy, Work


class RequestSource(Protocol):
    """Where the requests come from."""

    def poll(self) -> Request | None:
        """The next request, or None if there is none right now."""

    @property
    def exhausted(self) -> bool:
        """Whether `poll` will never again give a request."""


@dataclass
class MicroBatch:
    """The sequences that are visited together. `slots` in the order in which they take turns."""

    slots: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    awaited: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))  # slots whose token is under way


@dataclass
class _Visit:
    """A plan in the making."""

    budget: int  # tokens that may still be added
    decodes: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    prefills: list[tuple[int, int]] = field(default_factory=list)  # slot, tokens
    page_writes: list[IntArray] = field(default_factory=list)
    admitted: list[list[int]] = field(default_factory=list)
    stash: list[IntArray] = field(default_factory=list)
    restore: list[IntArray] = field(default_factory=list)


@dataclass
class Counters:
    """What memory pressure has cost so far."""

    suspensions: int = 0
    resumptions: int = 0
    recomputed_tokens: int = 0


class Scheduler:
    """Fills visits with sequences.

    State is kept in arrays by slot, so that the work per visit does not grow with a Python loop over sequences.
    A sequence has `length` tokens, prompt and output, of which the KV cache holds `computed`. One token missing is
    a decode, more is a prefill: of a new prompt, or of a sequence that was thrown out of memory.

    When pages run short, sequences of the visited micro-batch are suspended to the host pool, least work first, and
    resumed, oldest first, before anyone new is admitted; so the oldest sequence always gets on.
    """

    def __init__(
        self,
        policy: Policy,
        pages: PageAccount,
        source: RequestSource,
        *,
        page_size: int,
        micro_batch_size: int,
        max_batch_tokens: int,
        concurrency: int,
        eos_ids: tuple[int, ...],
        stopped: Callable[[Request, IntArray], str | None] = lambda request, tokens: None,
    ):
        self._policy, self._pages, self._source = policy, pages, source
        self._page_size = page_size
        self._micro_batch_size = micro_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._eos_ids = np.array(eos_ids, np.int32)
        self._stopped = stopped
        self.micro_batches = [MicroBatch() for _ in range(pages.rounds)]
        self.admitting = True
        self._abandoned = False
        self.counters = Counters()
        self._waiting: Request | None = None  # taken from the source, not yet admitted
        self._suspended: list[tuple[int, int]] = []  # heap of (age, slot)
        self._stashed: dict[int, IntArray] = {}  # slot: its host pages
        self._admissions = 0
        self._worst = np.zeros(pages.rounds, np.int64)  # pages each round needs if all its sequences go to their end
        self._largest = 0  # pages of the largest sequence so far, at its end
        self._free_slots = IdStack(np.arange(concurrency, dtype=np.int32))
        self._requests: list[Request | None] = [None] * concurrency
        self._tokens = np.zeros((concurrency, 64), np.int32)
        self._table = np.zeros((concurrency, 16), np.int32)
        self._length, self._computed, self._end, self._held, self._age = np.zeros((5, concurrency), np.int64)
        self._checked = np.zeros(concurrency, bool)  # has stop strings
        self._ignore_eos = np.zeros(concurrency, bool)

    # -- what the controller asks

    @property
    def in_flight(self) -> int:
        """Sequences that have been admitted and not finished."""
        return len(self._requests) - len(self._free_slots)

    @property
    def suspended(self) -> int:
        """Sequences that wait in the host pool."""
        return len(self._suspended)

    @property
    def finished(self) -> bool:
        """Whether no sequence is in flight and none will come."""
        return not self.in_flight and not self._more_to_admit()

    def retires(self, micro_batch: int) -> bool:
        """Whether `micro_batch` is empty and will remain so."""
        empty = not len(self.micro_batches[micro_batch].slots)
        return empty and not self._suspended and not self._more_to_admit()

    def pages_of(self, micro_batch: int) -> IntArray:
        """The pages that the micro-batch's sequences own."""
        slots = self.micro_batches[micro_batch].slots
        return np.concatenate([self._table[slot, : self._held[slot]] for slot in slots] or [np.zeros(0, np.int32)])

    def abandon(self) -> None:
        """Drop all sequences, unfinished as they are, and admit no more; all micro-batches retire."""
        self.admitting = False
        for micro_batch, batch in enumerate(self.micro_batches):
            for slot in batch.slots.tolist():
                self._release(micro_batch, slot)
                self._leave(micro_batch, slot)
                self._vacate(slot)
            batch.awaited = batch.awaited[:0]
        for _, slot in self._suspended:
            self._pages.host.give(self._stashed.pop(slot))
            self._vacate(slot)
        self._suspended.clear()
        self._abandoned = True

    def commit(self, micro_batch: int, tokens: IntArray) -> list[Completion]:
        """Append the sampled `tokens` of the micro-batch's visit; returns the sequences that they complete."""
        if self._abandoned:
            return []
        batch = self.micro_batches[micro_batch]
        slots = batch.awaited
        assert len(tokens) == len(slots), f"{len(tokens)} tokens for {len(slots)} sequences"
        batch.awaited = slots[:0]
        if not len(slots):
            return []
        at = self._length[slots]
        self._tokens = widen(self._tokens, int(at.max()) + 1)
        self._tokens[slots, at] = tokens
        failed = tokens == NO_TOKEN
        self._length[slots] += ~failed
        ended = np.isin(tokens, self._eos_ids) & ~self._ignore_eos[slots]
        done = ended | failed | (self._length[slots] >= self._end[slots])
        texts: dict[int, str] = {}
        for index in np.flatnonzero(self._checked[slots] & ~failed).tolist():
            text = self._stopped(self._request(slots[index]), self._output(slots[index]))
            if text is not None:
                texts[index] = text
                done[index] = ended[index] = True
        reasons = np.where(failed, "error", np.where(ended, "stop", "length"))
        return [
            self._finish(micro_batch, int(slots[index]), str(reasons[index]), texts.get(index))
            for index in np.flatnonzero(done).tolist()
        ]

    def plan(self, micro_batch: int) -> tuple[StepPlan, IntArray]:
        """The next visit of `micro_batch`: what all ranks do, and the token ids that rank 0 embeds."""
        if self.retires(micro_batch):
            return StepPlan(micro_batch, retires=True), np.zeros(0, np.int32)
        visit = _Visit(self._max_batch_tokens)
        if not self._make_room(micro_batch, visit):
            self._resume(micro_batch, visit)
        for work in self._policy.order:
            if work is Work.DECODE:
                self._add_decodes(micro_batch, visit)
            elif work is Work.PREFILL:
                self._add_prefills(micro_batch, visit)
            else:
                self._admit(micro_batch, visit)
            if self._policy.alone and visit.prefills:
                break
        return self._compose(micro_batch, visit)

    # -- filling a visit

    def _split(self, micro_batch: int, placed: list[int]) -> tuple[IntArray, IntArray]:
        """The micro-batch's sequences that decode, and the others: prefills, and those already `placed`."""
        slots = self.micro_batches[micro_batch].slots
        decoding = self._length[slots] - self._computed[slots] == 1
        if placed:  # a prompt of one token, admitted in this visit, looks like a decode
            decoding &= ~np.isin(slots, placed)
        return slots[decoding], slots[~decoding]

    def _add_decodes(self, micro_batch: int, visit: _Visit) -> None:
        decodes, prefills = self._split(micro_batch, [slot for slot, _ in visit.prefills])
        taken, rest = decodes[: visit.budget], decodes[visit.budget :]
        # Those that found no place in this visit come first in the next.
        self.micro_batches[micro_batch].slots = np.concatenate([prefills, rest, taken])
        visit.decodes = taken
        visit.budget -= len(taken)

    def _add_prefills(self, micro_batch: int, visit: _Visit) -> None:
        for slot in self._split(micro_batch, [])[1].tolist():
            if not visit.budget:
                break
            self._add_prefill(visit, slot)
            if self._policy.alone:
                break

    def _add_prefill(self, visit: _Visit, slot: int) -> None:
        count = min(visit.budget, int(self._length[slot] - self._computed[slot]))
        visit.prefills.append((slot, count))
        visit.budget -= count

    def _admit(self, micro_batch: int, visit: _Visit) -> None:
        """Admit waiting prompts while tokens, sequences and pages allow."""
        batch = self.micro_batches[micro_batch]
        while visit.budget and not self._suspended and len(batch.slots) < self._micro_batch_size and self._next():
            request = self._waiting
            assert request is not None
            length = len(request.prompt)
            end = length + request.sampling.max_tokens
            if not len(self._free_slots) or not self._affords(micro_batch, length, end):
                return
            self._waiting = None
            slot = int(self._free_slots.take(1)[0])
            self._requests[slot] = request
            self._tokens = widen(self._tokens, length + 1)
            self._tokens[slot, :length] = request.prompt
            self._length[slot], self._computed[slot], self._end[slot] = length, 0, end
            self._age[slot], self._admissions = self._admissions, self._admissions + 1
            self._held[slot] = 0
            self._checked[slot] = bool(request.sampling.stop)
            self._ignore_eos[slot] = request.sampling.ignore_eos
            self._largest = max(self._largest, self._pages_for(end - 1))
            self._enter(micro_batch, slot)
            self._grow(micro_batch, np.array([slot]), visit)
            visit.admitted.append(encode_sampling(slot, request.sampling))
            self._add_prefill(visit, slot)
            if self._policy.alone:
                return

    def _affords(self, micro_batch: int, length: int, end: int) -> bool:
        """Whether a sequence of `length` tokens that may grow to `end` can enter `micro_batch`.

        It must fit now, beside what the others need next. And should all sequences grow to their end, what does not
        fit on the GPU must fit in the host pool, where it would be suspended.
        """
        rows = len(self.micro_batches[micro_batch].slots)
        slack = -(-2 * rows // self._page_size)
        now = self._pages_for(length) + self._growth(micro_batch) + slack
        if rows and now > self._pages.free(micro_batch):
            return False
        if now - slack > self._pages.free(micro_batch):
            return False
        worst = self._worst.copy()
        worst[micro_batch] += self._pages_for(end - 1)
        overshoot = int(np.maximum(worst - self._pages.swap, 0).sum()) - self._pages.main
        # Sequences go to the host pool whole, so room for one more of the largest makes sure that enough of them do.
        largest = max(self._largest, self._pages_for(end - 1))
        return overshoot <= 0 or overshoot + largest <= self._pages.host.free_pages

    def _compose(self, micro_batch: int, visit: _Visit) -> tuple[StepPlan, IntArray]:
        """Give the rows their pages and turn the visit into a plan; its tokens count as computed from here on."""
        prefill_slots = np.array([slot for slot, _ in visit.prefills], np.int32)
        counts = np.array([count for _, count in visit.prefills], np.int32)
        slots = np.concatenate([visit.decodes, prefill_slots])
        new_tokens = np.concatenate([np.ones(len(visit.decodes), np.int32), counts])
        if len(slots):
            self._grow(micro_batch, slots, visit)
        context = self._computed[slots]
        self._computed[slots] += new_tokens
        sampled = np.flatnonzero(self._computed[slots] == self._length[slots]).astype(np.int32)
        self.micro_batches[micro_batch].awaited = slots[sampled]
        plan = StepPlan(
            micro_batch,
            slots=slots,
            new_tokens=new_tokens,
            context=context.astype(np.int32),
            sampled=sampled,
            page_writes=_stacked(visit.page_writes, 3),
            admitted=np.array(visit.admitted, np.int32).reshape(-1, 6),
            stash=_stacked(visit.stash, 2),
            restore=_stacked(visit.restore, 2),
        )
        decode_tokens = self._tokens[visit.decodes, context[: len(visit.decodes)]]
        chunks = [
            self._tokens[slot, start : start + count]
            for (slot, count), start in zip(visit.prefills, context[len(visit.decodes) :].tolist(), strict=True)
        ]
        return plan, np.concatenate([decode_tokens, *chunks])

    # -- pages

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _growth(self, micro_batch: int) -> int:
        """Pages that the micro-batch's sequences need to hold all their tokens, beyond those they own."""
        slots = self.micro_batches[micro_batch].slots
        wanted = -(-self._length[slots] // self._page_size)
        return int(np.maximum(wanted - self._held[slots], 0).sum())

    def _grow(self, micro_batch: int, slots: IntArray, visit: _Visit) -> None:
        """Give `slots` the pages that all their tokens need."""
        wanted = -(-self._length[slots] // self._page_size)
        missing = np.maximum(wanted - self._held[slots], 0)
        total = int(missing.sum())
        if not total:
            return
        pages = self._pages.take(micro_batch, total)
        owners = np.repeat(slots, missing)
        nth = np.arange(total) - np.repeat(np.cumsum(missing) - missing, missing)
        index = np.repeat(self._held[slots], missing) + nth
        self._table = widen(self._table, int(index.max()) + 1)
        self._table[owners, index] = pages
        self._held[slots] = np.maximum(wanted, self._held[slots])
        visit.page_writes.append(np.stack([owners, index, pages], 1).astype(np.int32))

    def _release(self, micro_batch: int, slot: int) -> None:
        self._pages.give(micro_batch, self._table[slot, : self._held[slot]])
        self._held[slot] = 0

    def _make_room(self, micro_batch: int, visit: _Visit) -> bool:
        """Suspend sequences until the others of the micro-batch find pages for their next token."""
        crowded = False
        while self._growth(micro_batch) > self._pages.free(micro_batch):
            slots = self.micro_batches[micro_batch].slots
            oldest = slots[np.argmin(self._age[slots])]
            victims = slots[slots != oldest] if len(slots) > 1 else slots
            self._suspend(micro_batch, int(victims[np.argmin(self._computed[victims])]), visit)
            crowded = True
        return crowded

    def _suspend(self, micro_batch: int, slot: int, visit: _Visit) -> None:
        used = self._pages_for(int(self._computed[slot]))
        if used <= self._pages.host.free_pages:
            self._stashed[slot] = self._pages.host.take(used)
            visit.stash.append(np.stack([self._table[slot, :used], self._stashed[slot]], 1).astype(np.int32))
        else:  # admission keeps this from happening but for pages stranded in other rounds
            self._stashed[slot] = np.zeros(0, np.int32)
            self.counters.recomputed_tokens += int(self._computed[slot])
            self._computed[slot] = 0
        self._release(micro_batch, slot)
        self._leave(micro_batch, slot)
        heapq.heappush(self._suspended, (int(self._age[slot]), slot))
        self.counters.suspensions += 1

    def _resume(self, micro_batch: int, visit: _Visit) -> None:
        """Bring back suspended sequences, oldest first, while there is room for them and a page to grow into."""
        batch = self.micro_batches[micro_batch]
        while self._suspended and len(batch.slots) < self._micro_batch_size:
            slot = self._suspended[0][1]
            needed = self._pages_for(int(self._length[slot])) + self._growth(micro_batch) + len(batch.slots)
            if min(needed, self._pages.reach) > self._pages.free(micro_batch):
                return
            heapq.heappop(self._suspended)
            self._enter(micro_batch, slot)
            self._grow(micro_batch, np.array([slot]), visit)
            host = self._stashed.pop(slot)
            visit.restore.append(np.stack([host, self._table[slot, : len(host)]], 1).astype(np.int32))
            self._pages.host.give(host)
            self.counters.resumptions += 1

    # -- sequences

    def _next(self) -> bool:
        """Whether a request waits to be admitted."""
        if self._waiting is None and self.admitting:
            self._waiting = self._source.poll()
        return self._waiting is not None and self.admitting

    def _more_to_admit(self) -> bool:
        return self.admitting and (self._waiting is not None or not self._source.exhausted)

    def _request(self, slot: int) -> Request:
        request = self._requests[slot]
        assert request is not None
        return request

    def _output(self, slot: int) -> IntArray:
        return self._tokens[slot, len(self._request(slot).prompt) : self._length[slot]]

    def _enter(self, micro_batch: int, slot: int) -> None:
        batch = self.micro_batches[micro_batch]
        batch.slots = np.append(batch.slots, np.int32(slot))
        self._worst[micro_batch] += self._pages_for(int(self._end[slot]) - 1)

    def _leave(self, micro_batch: int, slot: int) -> None:
        batch = self.micro_batches[micro_batch]
        batch.slots = batch.slots[batch.slots != slot]
        self._worst[micro_batch] -= self._pages_for(int(self._end[slot]) - 1)

    def _finish(self, micro_batch: int, slot: int, reason: str, text: str | None) -> Completion:
        completion = Completion(self._request(slot), self._output(slot).copy(), reason, text)
        self._release(micro_batch, slot)
        self._leave(micro_batch, slot)
        self._vacate(slot)
        return completion

    def _vacate(self, slot: int) -> None:
        self._requests[slot] = None
        self._free_slots.give(np.array([slot], np.int32))


def _stacked(parts: list[IntArray], width: int) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros((0, width), np.int32)
