"""Rank 0's decisions: which sequences run in a visit, on which pages, and which wait."""

from dataclasses import dataclass, field, replace

import numpy as np

from deserve.batch import (
    ADMISSION_ROOM,
    Begun,
    Completion,
    IntArray,
    Ints,
    Request,
    VisitPlan,
    VisitResult,
    beside_width,
    narrowed,
)
from deserve.layout import Layout
from deserve.model.admissions import Encoder, extra_words
from deserve.scheduler.drafts import CycleTime, Drafts
from deserve.scheduler.pages import Pages
from deserve.scheduler.policy import POLICIES, Fill
from deserve.scheduler.rounds import Awaited, MicroBatch, Moves, Rounds
from deserve.scheduler.sequences import CutFinder, Sequences, never
from deserve.scheduler.sliding import SlidingPages
from deserve.scheduler.window import SIZE, RequestSource, Waiting, Window

NONE = np.zeros(0, np.int32)
LATE = 0.1  # what the last visit weighs in a mean of the last ones
SHORTER = 0.9  # of a cycle: a round that has closed stays closed, and later more rounds may be better again
QUIET, ASKS = 4, 16  # visits without drafts, after which visits are planned ahead; of those, every so manieth is not


@dataclass
class _Filling:
    """A visit as it is filled: tokens that may still be added, rows that decode, and prompts."""

    budget: int
    decodes: IntArray = field(default_factory=lambda: NONE)
    drafts: Ints = field(default_factory=lambda: NONE)  # [decodes] draft tokens behind each
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
        layout: Layout,
        source: RequestSource,
        *,
        eos_ids: tuple[int, ...] = (),
        find_cuts: CutFinder = never,
        cycle_s: CycleTime | None = None,
        drafter: Drafts | None = None,
        share_prefixes: bool = False,
        grouped: bool = False,
        mixed: bool = False,
        rope_switch: int = 0,
    ):
        """`find_cuts` finds stop strings, in a thread.

        `cycle_s` gives the seconds between two visits of a round, where so many rounds share so many sequences. Without
        it no round is closed early. With `share_prefixes`, pages that prompts have in common are computed and kept
        once. If `grouped`, requests are admitted beside those that they share most with; if `mixed`, long prompts are
        mixed with long answers; else they are admitted as they come. `rope_switch`: keys of prompts of more tokens are
        rotated in another way, as `ModelConfig` has it.
        """
        self._policy, self._layout = POLICIES[layout.policy], layout
        self._cycle_s, self._drafter = cycle_s, drafter
        self._visit_tokens = layout.visit_tokens or layout.max_batch_tokens
        self.sequences = Sequences(layout.concurrency, eos_ids, find_cuts)
        slots, page_size = layout.concurrency, layout.page_size
        sliding = None
        if layout.sliding_pages:
            sliding = SlidingPages(layout.sliding_pages, layout.window, page_size, slots, layout.max_batch_tokens)
        self.pages = Pages(
            layout.main_pages,
            layout.swap_pages,
            layout.rounds,
            layout.host_height,
            page_size,
            slots,
            shares=share_prefixes,
            switch=rope_switch,
            sliding=sliding,
        )
        window = max(SIZE, 2 * layout.concurrency) if share_prefixes or mixed else 1
        self._window = Window(source, self.pages.chain, layout.page_size, window, grouped and share_prefixes, mixed)
        self.rounds = Rounds(layout.rounds, layout.micro_batch_size, self.sequences, self.pages)
        self.counters = self.rounds.counters
        self._encoder = Encoder(eos_ids)
        self._beside: dict[int, list[IntArray]] = {}  # by slot: log-probabilities of the output so far
        self._prompt_beside: dict[int, list[IntArray]] = {}  # the same of prompts, by slot of those that want them
        self.admitting = True
        self._abandoned = False
        self.prompt_tokens = self.cached_tokens = 0  # of all that were admitted, and found in prefix pages
        self._prompts_a_visit = 0.0  # prompt tokens, of late
        self._fewer = (0, 0, False)  # sequences in flight, open rounds, and whether fewer rounds would be better
        self._quiet = 0  # visits since the drafter has last had something to propose

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The sequences of each round."""
        return self.rounds.batches

    @property
    def in_flight(self) -> int:
        """Sequences that have been admitted and not finished."""
        return self.sequences.in_flight

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers so far, finished or not."""
        return self.sequences.output_tokens

    @property
    def waiting(self) -> int:
        """Requests that were taken from the source and not admitted yet."""
        return len(self._window)

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
        """Tokens that the next `commit` takes in."""
        under_way = self.micro_batches[micro_batch].under_way
        return int(under_way[0].samples.sum()) if under_way else 0

    def abandon(self) -> None:
        """Drop all sequences, unfinished as they are, and admit no more; all micro-batches retire."""
        self.admitting = False
        self.rounds.drop_all()
        self._beside.clear()
        self._prompt_beside.clear()
        self._abandoned = True

    def unfinished(self) -> list[Request]:
        """The requests in flight that have an answer, begun as far as it has come in."""
        sequences, found = self.sequences, []
        for slot in sequences.slots:
            output, blocks = sequences.output(slot), self._beside.get(slot)
            if len(output):
                beside = np.concatenate(blocks)[: len(output)] if blocks else None
                begun = Begun(output.copy(), beside, int(sequences.cached[slot]))
                found.append(replace(sequences.request(slot), begun=begun))
        return found

    def fill_by(self, policy: str, tokens: int, rows: int) -> None:
        """Fill visits by `policy` from now on, of at most `tokens` tokens, from micro-batches of `rows` sequences.

        A micro-batch that has more keeps them until they end.
        """
        self._policy, self._visit_tokens, self.rounds.size = POLICIES[policy], tokens, rows

    # -- a visit's end and the next one's beginning

    def commit(self, micro_batch: int, result: VisitResult) -> list[Completion]:
        """Take in what the micro-batch's oldest visit sampled; returns the sequences that it completes."""
        batch = self.micro_batches[micro_batch]
        if self._abandoned or not batch.under_way:
            return []
        awaited = batch.under_way.popleft()
        self._keep_scores(awaited.scores, result.prompt_beside)
        slots, samples = awaited.slots[awaited.counts], awaited.samples[awaited.counts]
        if not len(slots):
            return []
        sampled = int(awaited.samples.sum())
        assert len(result.tokens) == sampled, f"{len(result.tokens)} tokens where {sampled} were sampled"
        tokens, wanted = result.tokens, result.beside
        if not awaited.counts.all():
            of_them = np.repeat(awaited.counts, awaited.samples)
            tokens, wanted = tokens[of_them], wanted[of_them]
        completions = []
        sequences = self.sequences
        before = sequences.length[slots] - sequences.assumed[slots] if wanted.size else None
        endings = sequences.append(slots, samples, tokens)
        if before is not None:
            self._keep_beside(slots, samples, np.maximum(0, sequences.length[slots] - before), wanted)
        for later in batch.under_way:
            gone = np.array([ending.slot for ending in endings], np.int32)
            later.drop(np.append(slots[sequences.undecided[slots]], gone))
        for ending in endings:
            request, output = self.sequences.request(ending.slot), self.sequences.output(ending.slot).copy()
            beside = self._beside.pop(ending.slot, None)
            stacked = None if beside is None else np.concatenate(beside)[: len(output)]
            cached = int(self.sequences.cached[ending.slot])
            if self._drafter is not None:
                self._drafter.ends(self.sequences, ending.slot)
            scores = self._prompt_beside.pop(ending.slot, None)
            of_prompt = None if scores is None else np.concatenate(scores)
            completions.append(Completion(request, output, ending.reason, ending.text, stacked, cached, of_prompt))
            self.pages.release(micro_batch, ending.slot)
            self.rounds.leave(micro_batch, ending.slot)
            self.sequences.remove(ending.slot)
        return completions

    def _keep_beside(self, slots: IntArray, samples: IntArray, kept: Ints, beside: IntArray) -> None:
        """Note the log-probabilities of the first `kept` [rows] of the `samples` [rows] tokens of `slots` [rows]."""
        begin = np.cumsum(samples) - samples
        wanted = self.sequences.logprobs[slots]
        for logprobs in np.unique(wanted[wanted >= 0]).tolist():
            rows = np.flatnonzero(wanted == logprobs)
            words = narrowed(beside, logprobs)
            spans = zip(slots[rows].tolist(), begin[rows].tolist(), kept[rows].tolist(), strict=True)
            for slot, at, count in spans:
                self._beside.setdefault(slot, []).append(words[at : at + count].copy())

    def _keep_scores(self, scores: IntArray, beside: IntArray) -> None:
        """Note the log-probabilities `beside` [scored, width] of prompts; `scores` [n, 2] as a micro-batch has them."""
        at = 0
        for slot, count in scores.tolist():
            logprobs = self.sequences.request(slot).sampling.prompt_logprobs
            assert logprobs is not None
            words = beside[at : at + count]
            self._prompt_beside[slot].append(np.hstack([narrowed(words[:, :-1], logprobs), words[:, -1:]]))
            at += count

    def plan_ahead(self, micro_batch: int) -> tuple[VisitPlan, IntArray] | None:
        """The next visit of the only round while its last one is under way; the ids of tokens that this samples are
        PENDING. None where it must be known first what they are.

        Every sequence is taken to go on, as far as its length allows. If it has ended, `commit` drops what is sampled
        behind its end; its pages and its slot are given to others no earlier than in the visit after that.
        """
        batch, sequences = self.micro_batches[micro_batch], self.sequences
        if not batch.under_way:  # abandoned
            return None
        (awaited,) = batch.under_way
        drafts = self._drafter is not None and (self._quiet < QUIET or self._quiet % ASKS == 0)
        known = len(awaited.scores) or (awaited.samples > 1).any()
        if drafts or known or self.rounds.open.sum() > 1 or self._gathers(micro_batch):
            return None
        slots = awaited.slots[awaited.counts]
        # Who asks again computes a token anew: its grammar must not have gone on, nor its window. It waits a visit.
        asks = sequences.wavers[slots] & (sequences.guided[slots] | bool(self._layout.sliding_pages))
        going = slots[~asks & (sequences.length[slots] + 1 < sequences.end[slots])]
        sequences.assume(going)
        idle = not (sequences.missing(batch.slots) > 0).any()
        if idle or self.rounds.growth(micro_batch) > self.pages.free(micro_batch):
            sequences.withdraw(going)
            return None
        return self.plan(micro_batch)

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
        self._quiet += 1
        if self._drafter is not None and len(taken):
            if self.sequences.assumed[taken].any():
                self._drafter.passed(len(taken))
            else:
                self._add_drafts(micro_batch, visit, self._drafter)

    def _add_drafts(self, micro_batch: int, visit: _Filling, drafter: Drafts) -> None:
        """Let sequences that decode verify draft tokens, as far as budget and free pages allow."""
        sequences, slots = self.sequences, visit.decodes
        # No use beyond the end: the token after the last draft is sampled too.
        most = np.clip(sequences.end[slots] - sequences.length[slots] - 1, 0, drafter.most)
        if self._layout.sliding_pages:
            most = np.minimum(most, self._layout.page_size)  # for which room is reserved
        # Prompts that have yet to find their place in this visit are worth more.
        room = visit.budget if visit.prefills or not self.waiting else visit.budget // 2
        if self.pages.growth(slots, sequences.length[slots] + most) > self.pages.free(micro_batch):
            room = 0
        tail = not self._more_to_admit() and not self.rounds.waiting
        visit.drafts = drafter.propose(
            sequences, slots, most, room, int(self.rounds.open.sum()), round(self._prompts_a_visit), tail
        )
        visit.budget -= int(visit.drafts.sum())
        self._quiet = 0 if visit.drafts.any() else self._quiet
        visit.moves.page_writes.append(self.pages.grow(micro_batch, slots, sequences.length[slots] + visit.drafts))

    def _add_prefills(self, micro_batch: int, visit: _Filling) -> None:
        others = self._split(micro_batch, [])[1]
        for slot in others[self.sequences.missing(others) > 0].tolist():
            if not visit.budget:
                break
            self._add_prefill(micro_batch, visit, slot)
            if self._policy.alone:
                break

    def _add_prefill(self, micro_batch: int, visit: _Filling, slot: int) -> None:
        computed = int(self.sequences.computed[slot])
        count = min(visit.budget, int(self.sequences.length[slot]) - computed)
        visit.prefills.append((slot, count))
        visit.budget -= count
        self.pages.computes(micro_batch, slot, computed + count)

    def _split(self, micro_batch: int, placed: list[int]) -> tuple[IntArray, IntArray]:
        """The micro-batch's sequences that decode, and the others: prefills, those already `placed`, and those that
        wait for the token that is awaited."""
        slots = self.micro_batches[micro_batch].slots
        decoding = self.sequences.missing(slots) == 1
        if placed:  # a prompt of one token, admitted in this visit, looks like a decode
            decoding &= ~np.isin(slots, placed)
        return slots[decoding], slots[~decoding]

    def _admit(self, micro_batch: int, visit: _Filling) -> None:
        """Admit prompts that wait outside while tokens, places and pages allow."""
        while visit.budget and not self.rounds.waiting and self.rounds.has_place(micro_batch) and self._poll():
            next_ = self._next()
            if next_ is None or not self._admit_one(micro_batch, visit, *next_) or self._policy.alone:
                return

    def _next(self) -> tuple[Waiting, IntArray] | None:
        """Who is to be admitted next, with the prefix pages found for it.

        Whoever begins with a page that somebody in flight is about to compute waits for that. Others come first then,
        as long as that drives out no prefix page that is wanted.
        """
        pages, prefixes = self.pages, self.pages.prefixes
        passed = False
        for waiting in self._window.candidates():
            found = pages.find(waiting.chain)
            if prefixes.expects(waiting.chain, len(found)):
                passed = True
            elif passed and (
                pages.count(waiting.request.length) - len(found) > pages.free_main - prefixes.unread + prefixes.spare
            ):
                return None
            else:
                return waiting, found
        return None

    def _admit_one(self, micro_batch: int, visit: _Filling, waiting: Waiting, found: IntArray) -> bool:
        """Admit `waiting`, if there is room."""
        request = waiting.request
        length, begun = request.length, request.begun
        end = len(request.prompt) + request.sampling.max_tokens - 1  # the last token is not computed
        room = self._room(micro_batch, length, end, found) if self.sequences.free else -1
        if room < 0:
            return False
        if not self.rounds.may_read(micro_batch, len(found), visit.moves):
            return False
        words = visit.room - extra_words(request.sampling, length)
        if words < 0 and visit.admissions:
            return False
        again = self._window.shared_with_others(waiting)
        missing = again // self.pages.page_size - len(found)
        if self.in_flight and self.pages.free_main < missing <= self.pages.main:
            return False  # rather than that all the others compute what finds no main page now
        visit.room = words
        self._window.take(waiting)
        copied = self.pages.longest(waiting.chain, found) if room else (0, 0)
        cached = len(found) * self.pages.page_size + copied[1]
        self.prompt_tokens, self.cached_tokens = self.prompt_tokens + len(request.prompt), self.cached_tokens + cached
        slot = self.sequences.add(request, cached)
        self.pages.expect(end)
        if begun.beside is not None:
            self._beside[slot] = [begun.beside]
        self.rounds.place(micro_batch, slot, waiting.chain, found, again, visit.moves, copied)
        tokens = self.sequences.chunk(slot, 0, length)
        visit.admissions.append(self._encoder.words(slot, request.sampling, len(request.prompt), tokens))
        if request.sampling.prompt_logprobs is not None:
            self._prompt_beside[slot] = [np.zeros((0, beside_width(request.sampling.prompt_logprobs) + 1), np.int32)]
        self._add_prefill(micro_batch, visit, slot)
        return True

    def _room(self, micro_batch: int, length: int, end: int, found: IntArray) -> int:
        """Pages left if a sequence of `length` tokens comes in, beside what the others need next.

        Negative unless it fits, and to its `end` too. Its first pages are `found`; those that somebody reads need no
        room.
        """
        rows = len(self.micro_batches[micro_batch].slots)
        slack = self.pages.count(2 * rows)
        read = len(found) - self.pages.unread(found)
        now = self.pages.count(length) - read + self.rounds.growth(micro_batch) + slack
        return self.pages.free(micro_batch) - now if self.pages.affords(micro_batch, end, read) else -1

    def _compose(self, micro_batch: int, visit: _Filling) -> tuple[VisitPlan, IntArray]:
        """Give the rows their pages and turn the visit into a plan; its tokens count as computed from here on.

        Draft tokens do not: they are, once they have been found right.
        """
        sequences, batch = self.sequences, self.micro_batches[micro_batch]
        prompts = np.array(visit.prefills, np.int32).reshape(-1, 2)
        slots = np.concatenate([visit.decodes, prompts[:, 0]])
        new_tokens = np.concatenate([np.ones(len(visit.decodes), np.int32), prompts[:, 1]])
        self._prompts_a_visit += LATE * (int(prompts[:, 1].sum()) - self._prompts_a_visit)
        length, context = sequences.length[slots], sequences.computed[slots]
        visit.moves.page_writes.append(self.pages.grow(micro_batch, slots, length))
        computed = context + new_tokens
        sequences.computed[slots] = computed
        complete = computed == length
        samples = complete.astype(np.int32)
        new_tokens[: len(visit.drafts)] += visit.drafts
        samples[: len(visit.drafts)] += visit.drafts
        sliding_writes = self.pages.slide(slots, context + new_tokens, computed)
        scores = self._scores(slots, context, computed) if self._prompt_beside else NONE
        scoring = np.flatnonzero(scores)
        scored = np.stack([slots[scoring], scores[scoring]], 1)
        batch.under_way.append(Awaited(slots[complete], samples[complete], scored, complete[complete]))
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
            drafts=sequences.ids(visit.decodes, length[:rows], new_tokens[:rows] - 1),
            scores=scores if len(scoring) else NONE,
            sorts=slots[sequences.undecided[slots]],
            page_writes=_stacked(visit.moves.page_writes, 3),
            sliding_writes=sliding_writes,
            stash=_stacked(visit.moves.stash, 2),
            copies=_stacked(visit.moves.copies, 2),
            restore=_stacked(visit.moves.restore, 2),
            admissions=visit.admissions,
        )
        sequences.undecided[slots] = False
        self.pages.planned()
        return plan, np.concatenate([ids, *chunks])

    def _scores(self, slots: IntArray, context: Ints, computed: Ints) -> IntArray:
        """How many prompt tokens are to be scored in a visit that computes `slots` [rows] from `context` [rows] up to
        `computed` [rows]: [rows]. A token is scored by the one before it; of those computed anew some have been."""
        scores = np.zeros(len(slots), np.int32)
        for row, slot in enumerate(slots.tolist()):
            if slot in self._prompt_beside:
                had = sum(map(len, self._prompt_beside[slot]))
                end = min(int(computed[row]), len(self.sequences.request(slot).prompt) - 1)
                scores[row] = max(0, end - max(int(context[row]), had))
        return scores

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
        if self.admitting:
            self._window.fill()
        return self.admitting and len(self._window) > 0

    def _more_to_admit(self) -> bool:
        return self.admitting and not self._window.exhausted


def _stacked(parts: list[IntArray], width: int) -> IntArray:
    parts = [part for part in parts if len(part)]
    return np.concatenate(parts) if parts else np.zeros((0, width), np.int32)
