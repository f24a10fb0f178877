"""Rank 0's decisions: which sequences run in a visit, on which pages, and which wait."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deserve.batch import ADMISSION_ROOM, Completion, IntArray, Ints, Request, VisitPlan, VisitResult
from deserve.model.admissions import Encoder, extra_words
from deserve.planner.plan import Plan
from deserve.scheduler.pages import Pages
from deserve.scheduler.policy import POLICIES, Fill
from deserve.scheduler.rounds import MicroBatch, Moves, Rounds
from deserve.scheduler.sequences import Sequences, never

NONE = np.zeros(0, np.int32)
SHORTER = 0.9  # of a cycle: a round that has closed stays closed, and later more rounds may be better again


class RequestSource(Protocol):
    """Where the requests come from."""

    def poll(self) -> Request | None:
        """The next request, or None if there is none right now."""

    @property
    def exhausted(self) -> bool:
        """Whether `poll` will never again give a request."""


# Of slots [rows], how many draft tokens stand behind each sequence, at most so many: [rows]. Puts them there.
Drafter = Callable[[Sequences, IntArray, IntArray], IntArray]


@dataclass
class _Filling:
    """A visit as it is filled: tokens that may still be added, rows that decode, and prompts."""

    budget: int
    decodes: IntArray = field(default_factory=lambda: NONE)
    drafts: IntArray = field(default_factory=lambda: NONE)  # [decodes] draft tokens behind each
    prefills: list[tuple[int, int]] = field(default_factory=list)  # slot, tokens
    admissions: list[IntArray] = field(default_factory=list)
    room: int = ADMISSION_ROOM  # words that further admissions may have beyond their first ones
    moves: Moves = field(default_factory=Moves)


class Scheduler:
    """Fills visits with sequences.

    When pages run short, sequences of the visited micro-batch are suspended to the host pool and resumed before anyone
    new is admitted. When nobody is left to admit, sequences are gathered in fewer micro-batches if that brings their
    next tokens sooner.
    """

    def __init__(
        self,
        layout: Plan,
        source: RequestSource,
        *,
        eos_ids: tuple[int, ...] = (),
        stopped: Callable[[Request, IntArray], str | None] = never,
        cycle_s: Callable[[int, int], float] | None = None,
        drafter: Drafter | None = None,
    ):
        """`stopped` gives an answer's text up to its first stop string, None where there is none yet.

        `cycle_s` gives the seconds between two visits of a round, where so many rounds share so many sequences. Without
        it no round is closed early.
        """
        self._policy, self._layout, self._source = POLICIES[layout.policy], layout, source
        self._cycle_s, self._drafter = cycle_s, drafter
        self._visit_tokens = layout.visit_tokens or layout.max_batch_tokens
        self.sequences = Sequences(layout.concurrency, eos_ids, stopped)
        self.pages = Pages(
            layout.main_pages,
            layout.swap_pages,
            layout.rounds,
            layout.host_height,
            layout.page_size,
            layout.concurrency,
        )
        self.rounds = Rounds(layout.rounds, layout.micro_batch_size, self.sequences, self.pages)
        self.counters = self.rounds.counters
        self._encoder = Encoder(eos_ids)
        self._beside: dict[int, list[IntArray]] = {}  # by slot: log-probabilities of the output so far
        self.admitting = True
        self._abandoned = False
        self._next: Request | None = None  # taken from the source, not yet admitted
        self._fewer = (0, 0, False)  # sequences in flight, open rounds, and whether fewer rounds would be better

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The sequences of each round."""
        return self.rounds.batches

    @property
    def in_flight(self) -> int:
        """Sequences that have been admitted and not finished."""
        return self.sequences.in_flight

    @property
    def finished(self) -> bool:
        """Whether no sequence is in flight and none will come."""
        return not self.in_flight and not self._more_to_admit()

    def retires(self, micro_batch: int) -> bool:
        """Whether `micro_batch` is empty and will remain so."""
        if not self.rounds.open[micro_batch]:
            return True
        empty = not len(self.micro_batches[micro_batch].slots)
        return empty and not self.rounds.waiting and not self._more_to_admit()

    def awaited(self, micro_batch: int) -> int:
        """Tokens that the micro-batch's last visit samples, until `commit` has taken them in."""
        return int(self.micro_batches[micro_batch].samples.sum())

    def abandon(self) -> None:
        """Drop all sequences, unfinished as they are, and admit no more; all micro-batches retire."""
        self.admitting = False
        self.rounds.drop_all()
        self._beside.clear()
        self._abandoned = True

    def fill_by(self, policy: str, tokens: int, rows: int) -> None:
        """Fill visits by `policy` from now on, of at most `tokens` tokens, from micro-batches of `rows` sequences.

        A micro-batch that has more keeps them until they end.
        """
        self._policy, self._visit_tokens, self.rounds.size = POLICIES[policy], tokens, rows

    # -- a visit's end and the next one's beginning

    def commit(self, micro_batch: int, result: VisitResult) -> list[Completion]:
        """Take in what the micro-batch's visit sampled; returns the sequences that it completes."""
        batch = self.micro_batches[micro_batch]
        slots, samples = batch.awaited, batch.samples
        if self._abandoned or not len(slots):
            return []
        sampled = int(samples.sum())
        assert len(result.tokens) == sampled, f"{len(result.tokens)} tokens where {sampled} were sampled"
        batch.awaited, batch.samples = NONE, NONE
        completions = []
        before = self.sequences.length[slots] if result.beside.size else None
        endings = self.sequences.append(slots, samples, result.tokens)
        if before is not None:
            self._keep_beside(slots, samples, self.sequences.length[slots] - before, result.beside)
        for ending in endings:
            request, output = self.sequences.request(ending.slot), self.sequences.output(ending.slot).copy()
            beside = self._beside.pop(ending.slot, None)
            completions.append(
                Completion(request, output, ending.reason, ending.text, None if beside is None else np.stack(beside))
            )
            self.pages.release(micro_batch, ending.slot)
            self.rounds.leave(micro_batch, ending.slot)
            self.sequences.remove(ending.slot)
        return completions

    def _keep_beside(self, slots: IntArray, samples: IntArray, kept: Ints, beside: IntArray) -> None:
        """Note the log-probabilities of the first `kept` [rows] of the `samples` [rows] tokens of `slots` [rows]."""
        begin = np.cumsum(samples) - samples
        for row, slot in enumerate(slots.tolist()):
            logprobs = self.sequences.request(slot).sampling.logprobs
            if logprobs is not None:
                words = beside[begin[row] : begin[row] + kept[row]]
                top = (beside.shape[1] - 1) // 2
                own = [0, *range(1, 1 + logprobs), *range(1 + top, 1 + top + logprobs)]
                self._beside.setdefault(slot, []).extend(words[:, own].copy())

    def plan(self, micro_batch: int) -> tuple[VisitPlan, IntArray]:
        """The next visit of `micro_batch`: what all ranks do, and the token ids that rank 0 embeds."""
        visit = _Filling(self._visit_tokens)
        if self._gathers(micro_batch) and self.rounds.close(micro_batch, visit.moves):
            return self._compose(micro_batch, visit)
        if self.retires(micro_batch):
            self.rounds.open[micro_batch] = False
            return self._compose(micro_batch, visit)
        if not self.rounds.make_room(micro_batch, visit.moves):
            self.rounds.resume(micro_batch, visit.moves)
        for fill in self._policy.order:
            if fill is Fill.DECODE:
                self._add_decodes(micro_batch, visit)
            elif fill is Fill.PREFILL:
                self._add_prefills(micro_batch, visit)
            else:
                self._admit(micro_batch, visit)
            if self._policy.alone and visit.prefills:
                break
        return self._compose(micro_batch, visit)

    def _add_decodes(self, micro_batch: int, visit: _Filling) -> None:
        decodes, prefills = self._split(micro_batch, [slot for slot, _ in visit.prefills])
        taken, rest = decodes[: visit.budget], decodes[visit.budget :]
        # Those that found no place in this visit come first in the next.
        self.micro_batches[micro_batch].slots = np.concatenate([prefills, rest, taken])
        visit.decodes = taken
        visit.budget -= len(taken)
        if self._drafter is not None and len(taken):
            self._add_drafts(micro_batch, visit, self._drafter)

    def _add_drafts(self, micro_batch: int, visit: _Filling, drafter: Drafter) -> None:
        """Let sequences that decode verify draft tokens, as far as budget and free pages allow."""
        sequences, slots = self.sequences, visit.decodes
        # No use beyond the end: the token after the last draft is sampled too.
        most = np.minimum(sequences.end[slots] - sequences.length[slots] - 1, visit.budget)
        drafts = drafter(sequences, slots, most)
        drafts = np.maximum(0, np.minimum(drafts, visit.budget - np.cumsum(drafts) + drafts)).astype(np.int32)
        if self.pages.growth(slots, sequences.length[slots] + drafts) > self.pages.free(micro_batch):
            return
        visit.drafts = drafts
        visit.budget -= int(drafts.sum())
        visit.moves.page_writes.append(self.pages.grow(micro_batch, slots, sequences.length[slots] + drafts))

    def _add_prefills(self, micro_batch: int, visit: _Filling) -> None:
        for slot in self._split(micro_batch, [])[1].tolist():
            if not visit.budget:
                break
            self._add_prefill(visit, slot)
            if self._policy.alone:
                break

    def _add_prefill(self, visit: _Filling, slot: int) -> None:
        count = min(visit.budget, int(self.sequences.length[slot] - self.sequences.computed[slot]))
        visit.prefills.append((slot, count))
        visit.budget -= count

    def _split(self, micro_batch: int, placed: list[int]) -> tuple[IntArray, IntArray]:
        """The micro-batch's sequences that decode, and the others: prefills, and those already `placed`."""
        slots = self.micro_batches[micro_batch].slots
        decoding = self.sequences.missing(slots) == 1
        if placed:  # a prompt of one token, admitted in this visit, looks like a decode
            decoding &= ~np.isin(slots, placed)
        return slots[decoding], slots[~decoding]

    def _admit(self, micro_batch: int, visit: _Filling) -> None:
        """Admit prompts that wait outside while tokens, places and pages allow."""
        while visit.budget and not self.rounds.waiting and self.rounds.has_place(micro_batch) and self._poll():
            request = self._next
            assert request is not None
            length = len(request.prompt)
            end = length + request.sampling.max_tokens - 1  # the last token is not computed
            if not self.sequences.free or not self._has_room(micro_batch, length, end):
                return
            visit.room -= extra_words(request.sampling, length)
            if visit.room < 0 and visit.admissions:
                return
            self._next = None
            slot = self.sequences.add(request)
            self.pages.expect(end)
            self.rounds.enter(micro_batch, slot)
            visit.moves.page_writes.append(self.pages.grow(micro_batch, np.array([slot]), np.array([length])))
            visit.admissions.append(self._encoder.words(slot, request.sampling, length, request.prompt))
            self._add_prefill(visit, slot)
            if self._policy.alone:
                return

    def _has_room(self, micro_batch: int, length: int, end: int) -> bool:
        """Whether a prompt of `length` tokens fits now, beside what the others need next, and to its `end` too."""
        rows = len(self.micro_batches[micro_batch].slots)
        slack = self.pages.count(2 * rows)
        now = self.pages.count(length) + self.rounds.growth(micro_batch) + slack
        return now <= self.pages.free(micro_batch) and self.pages.affords(micro_batch, end)

    def _compose(self, micro_batch: int, visit: _Filling) -> tuple[VisitPlan, IntArray]:
        """Give the rows their pages and turn the visit into a plan; its tokens count as computed from here on.

        Draft tokens do not: they are, once they have been found right.
        """
        sequences, batch = self.sequences, self.micro_batches[micro_batch]
        prompts = np.array(visit.prefills, np.int32).reshape(-1, 2)
        slots = np.concatenate([visit.decodes, prompts[:, 0]])
        new_tokens = np.concatenate([np.ones(len(visit.decodes), np.int32), prompts[:, 1]])
        length, context = sequences.length[slots], sequences.computed[slots]
        visit.moves.page_writes.append(self.pages.grow(micro_batch, slots, length))
        computed = context + new_tokens
        sequences.computed[slots] = computed
        complete = computed == length
        samples = complete.astype(np.int32)
        new_tokens[: len(visit.drafts)] += visit.drafts
        samples[: len(visit.drafts)] += visit.drafts
        batch.awaited, batch.samples = slots[complete], samples[complete]
        rows = len(visit.decodes)
        ids = sequences.ids(visit.decodes, context[:rows], new_tokens[:rows])
        chunks = [
            sequences.chunk(slot, begin, count)
            for (slot, count), begin in zip(visit.prefills, context[rows:].tolist(), strict=True)
        ]
        plan = VisitPlan(
            micro_batch,
            retires=not self.rounds.open[micro_batch],
            slots=slots,
            new_tokens=new_tokens,
            context=context.astype(np.int32),
            samples=samples,
            page_writes=_stacked(visit.moves.page_writes, 3),
            stash=_stacked(visit.moves.stash, 2),
            restore=_stacked(visit.moves.restore, 2),
            admissions=visit.admissions,
        )
        return plan, np.concatenate([ids, *chunks])

    # -- the job's end

    def _gathers(self, micro_batch: int) -> bool:
        """Whether the sequences left get their tokens clearly sooner in fewer rounds than there are."""
        if self._cycle_s is None or self._more_to_admit() or not self.rounds.open[micro_batch]:
            return False
        sequences, rounds = self.in_flight, int(self.rounds.open.sum())
        if self._fewer[:2] != (sequences, rounds):
            least = max(1, -(-sequences // self.rounds.size))
            now = self._cycle_s(rounds, sequences)
            best = min((self._cycle_s(fewer, sequences) for fewer in range(least, rounds)), default=np.inf)
            self._fewer = sequences, rounds, bool(sequences and best <= SHORTER * now)
        return self._fewer[2]

    def requeue_all(self) -> None:
        """Compute all sequences in flight anew, with the tokens they have; what is awaited is not taken in any more."""
        self.rounds.requeue_all()

    # -- requests

    def _poll(self) -> bool:
        """Whether a request waits to be admitted."""
        if self._next is None and self.admitting:
            self._next = self._source.poll()
        return self._next is not None and self.admitting

    def _more_to_admit(self) -> bool:
        return self.admitting and (self._next is not None or not self._source.exhausted)


def _stacked(parts: list[IntArray], width: int) -> IntArray:
    parts = [part for part in parts if len(part)]
    return np.concatenate(parts) if parts else np.zeros((0, width), np.int32)
