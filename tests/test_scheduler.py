"""The scheduler alone, with a fake engine that does to its pages what a stage would do, and looks at every one."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deserve.batch import (
    NO_TOKEN,
    PENDING,
    SCORE_WIDTH,
    UNDECIDED,
    Begun,
    Completion,
    Ints,
    Request,
    SamplingParams,
    VisitPlan,
    VisitResult,
)
from deserve.kvcache.buddy import BuddyAllocator
from deserve.layout import Layout, most_sliding
from deserve.scheduler import sequences as sequences_module
from deserve.scheduler.policy import POLICIES
from deserve.scheduler.scheduler import Scheduler
from deserve.scheduler.sequences import Cut, Sequences
from deserve.scheduler.sliding import SlidingPages
from deserve.workload.read_ahead import ReadAhead

EOS = 7
SLOTS = 64


@dataclass
class Source:
    """Requests that come one by one; `pause` polls in a row find none."""

    requests: deque[Request]
    pause: int = 0
    polls: int = 0

    def poll(self) -> Request | None:
        self.polls += 1
        if not self.requests or self.polls % (self.pause + 1):
            return None
        return self.requests.popleft()

    @property
    def exhausted(self) -> bool:
        return not self.requests


@dataclass
class Case:
    """A workload and the room there is for it.

    Prompts as (tokens, max_tokens, end): tokens until end of text, or if negative until the logits are NaN, or 0.
    """

    prompts: list[tuple[int, int, int]]
    policy: str = "prefill_first"
    rounds: int = 2
    page_size: int = 4
    main: int = 16
    swap: int = 0
    height: int = 4
    micro_batch_size: int = 4
    max_batch_tokens: int = 8
    concurrency: int = 8
    pause: int = 0
    gather: bool = False  # close rounds whenever that can be done
    drafts: int = 0  # draft tokens of a row, at most; -1: whoever is asked for them has none
    losses: tuple[int, ...] = ()  # visits before which all KV memory is lost, and what is under way
    undecided: int = 0  # of so many tokens, one is to be asked for again; 0: none
    requeued: tuple[int, ...] = ()  # visits before which a sequence of the round is requeued
    latency: int = 0  # a cycle is never shorter than that of so many rounds
    common: tuple[tuple[int, int], ...] = ()  # of the first prompts: family, and tokens that it shares with that
    share: bool = True
    grouped: bool = True
    mixed: bool = False
    stop_token: bool = False  # `EOS` is a stop token of each request, instead of the model's end of text
    begun: tuple[int, ...] = ()  # of the first requests, tokens of the answer that are known at the start
    window: int = 0  # of some layers, with just enough sliding pages for `slides` whole sequences; 0: none has one
    slides: int = 1
    cut: int = 0  # every answer that gets so far holds a stop string there, which ends with this token
    ahead: bool = False  # plan the only round's next visit while its last one is under way, where that can be done

    @property
    def layout(self) -> Layout:
        return Layout(
            partition=(0,),
            rounds=self.rounds,
            micro_batch_size=self.micro_batch_size,
            concurrency=self.concurrency,
            max_batch_tokens=self.max_batch_tokens,
            policy=self.policy,
            page_size=self.page_size,
            main_pages=self.main,
            swap_pages=self.swap,
            host_height=self.height,
            sliding_pages=self.sliding,
            window=self.window,
        )

    @property
    def sliding(self) -> int:
        """Sliding pages; 0: there are none."""
        most = most_sliding(self.window, self.page_size)
        return self.slides * most + self.max_batch_tokens // self.page_size if self.window else 0

    def scheduler(self, source: "Source", **options: Any) -> Scheduler:
        """Closes rounds as `gather` says, and has draft tokens of which every third is wrong."""

        def find_cuts(requests: list[Request], outputs: list[np.ndarray]) -> list[Cut | None]:
            return [
                Cut(self.cut, request.custom_id) if len(output) >= self.cut else None
                for request, output in zip(requests, outputs, strict=True)
            ]

        options = {
            "eos_ids": () if self.stop_token else (EOS,),
            "share_prefixes": self.share,
            "grouped": self.grouped,
            "mixed": self.mixed,
        } | options
        options["find_cuts"] = find_cuts
        if self.gather:
            options["cycle_s"] = lambda rounds, sequences: float(max(rounds, self.latency))
        if self.drafts:
            options["drafter"] = Guesses(max(0, self.drafts))
        return Scheduler(self.layout, source, **options)


@dataclass
class Guesses:
    """Drafts of which every third is wrong."""

    most: int
    rows: int = 0  # that have decoded

    def propose(
        self, sequences: Sequences, slots: Ints, most: Ints, room: int, rounds: int, prompts: int, tail: bool = False
    ) -> Ints:
        self.passed(len(slots))
        counts = np.minimum(most, self.most)
        counts = np.clip(room - np.cumsum(counts) + counts, 0, counts)
        drafts = []
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            content = [*sequences.request(slot).prompt.tolist(), *sequences.output(slot).tolist()]
            for _ in range(count):
                drafts.append(next_token(tuple(content)) if len(content) % 3 else 1)
                content.append(drafts[-1])
        sequences.propose(slots, counts, np.array(drafts, np.int32))
        return counts

    def passed(self, rows: int) -> None:
        self.rows += rows

    def ends(self, sequences: Sequences, slot: int) -> None:
        assert sequences.length[slot] <= sequences.end[slot]


def next_token(slot_content: tuple[int, ...]) -> int:
    """The fake model: the token after a sequence is a function of all tokens before it. Never `EOS`."""
    return 100 + hash(slot_content) % 1000


@dataclass
class Engine:
    """Applies plans to a model of the pages, in which a page holds the tokens whose keys and values it would hold."""

    case: Case
    main: dict[tuple[int, int], int] = field(default_factory=dict)  # (page, offset): token
    swap: list[dict[tuple[int, int], int]] = field(default_factory=list)  # one for each micro-batch
    host: dict[tuple[int, int], int] = field(default_factory=dict)
    tables: dict[int, dict[int, int]] = field(default_factory=dict)  # slot: index: page
    sliding: dict[tuple[int, int], int] = field(default_factory=dict)
    sliding_tables: dict[int, dict[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lose()

    def lose(self) -> None:
        """Forget all pages."""
        self.main, self.host, self.tables, self.sliding, self.sliding_tables = {}, {}, {}, {}, {}
        self.swap = [{} for _ in range(self.case.rounds)]

    def memory(self, micro_batch: int, page: int) -> dict[tuple[int, int], int]:
        assert 0 <= page < self.case.main + self.case.swap
        return self.main if page < self.case.main else self.swap[micro_batch]

    def visit(self, plan: VisitPlan, tokens: np.ndarray, stops: dict[int, int]) -> list[int]:
        """The sampled tokens of a visit. `stops`: the length at which a slot's sequence ends with `EOS`, if it does.

        A negative length ends it with `NO_TOKEN`.
        """
        size = self.case.page_size
        for page, host in plan.stash.tolist():
            source = self.memory(plan.micro_batch, page)
            for offset in range(size):
                self.host.pop((host, offset), None)
                if (page, offset) in source:
                    self.host[host, offset] = source[page, offset]
        for page, target in plan.copies.tolist():
            assert page < self.case.main and target < self.case.main
            for offset in range(size):
                self.main.pop((target, offset), None)
                if (page, offset) in self.main:
                    self.main[target, offset] = self.main[page, offset]
        for host, page in plan.restore.tolist():
            target = self.memory(plan.micro_batch, page)
            for offset in range(size):
                target.pop((page, offset), None)
                if (host, offset) in self.host:
                    target[page, offset] = self.host[host, offset]
        for slot, index, page in plan.page_writes.tolist():
            self.tables.setdefault(slot, {})[index] = page
        contexts = dict(zip(plan.slots.tolist(), plan.context.tolist(), strict=True))
        for slot, index, page in plan.sliding_writes.tolist():
            assert 0 <= page < self.case.sliding
            if index * size >= contexts.get(
                slot, index * size + 1
            ):  # no prefix page: who held it before is done with it
                for offset in range(size):
                    self.sliding.pop((page, offset), None)
            self.sliding_tables.setdefault(slot, {})[index] = page
        sampled: list[int] = []
        at = read = 0
        fields = (plan.slots, plan.new_tokens, plan.context, plan.samples)
        rows = list(zip(*(row.tolist() for row in fields), strict=True))
        for slot, new, context, _ in rows:  # all keys are written before any is read
            for position in range(context, context + new):
                page = self.tables[slot][position // size]
                self.memory(plan.micro_batch, page)[page, position % size] = int(tokens[at])
                if self.case.window:
                    self.sliding[self.sliding_tables[slot][position // size], position % size] = int(tokens[at])
                at += 1
        for slot, new, context, samples in rows:
            assert new >= 1 and samples <= new
            read += -(-(context + new) // size)
            pages = [self.tables[slot][position // size] for position in range(context + new)]
            content = [
                self.memory(plan.micro_batch, page)[page, position % size] for position, page in enumerate(pages)
            ]
            if self.case.window:
                inside = range(max(0, context - self.case.window + 1), context + new)
                slid = [self.sliding[self.sliding_tables[slot][at // size], at % size] for at in inside]
                assert slid == content[inside.start :], "a page is gone that a window reaches"
            for length in range(context + new - samples + 1, context + new + 1):
                ends = {length: EOS, -length: NO_TOKEN}
                so_far = tuple(content[:length])
                undecided = self.case.undecided and hash(so_far) % self.case.undecided == 0
                if undecided and slot not in plan.sorts:
                    sampled.append(UNDECIDED)
                else:
                    sampled.append(ends.get(stops.get(slot, 0), next_token(so_far)))
        assert at == len(tokens) and read <= self.case.layout.visit_pages
        return sampled

    def tokens(self, page: int) -> list[int | None]:
        """What the main page `page` holds."""
        return [self.main.get((page, offset)) for offset in range(self.case.page_size)]


def requests_of(case: Case) -> list[Request]:
    """Prompts that share what `case.common` says, beginning with 8 tokens that all families share; then a token that
    names them, so that no two sequences are alike."""
    requests = []
    for index, (length, max_tokens, _) in enumerate(case.prompts):
        family, common = case.common[index] if index < len(case.common) else (0, 0)
        stem = [20_000 + at + (100 * family if at >= 8 else 0) for at in range(common)]
        prompt = [*stem, 10_000 + index, *range(length)][:length]
        sampling = SamplingParams(
            max_tokens,
            temperature=float(bool(case.undecided)),
            top_p=0.5 if case.undecided else 1.0,
            stop=("stop",) if case.cut else (),
            stop_token_ids=(1, 2, EOS)[index % 2 :] if case.stop_token else (),
            prompt_logprobs=0 if index % 3 == 1 else None,
        )
        request = Request(f"r{index}", np.array(prompt, np.int32), sampling)
        if (
            index < len(case.begun) and sampling.prompt_logprobs is None
        ):  # all but the last token, at most; perhaps more than up to a stop string
            answer = expected_output(request, abs(case.prompts[index][2]))[0][: case.begun[index]]
            begun = Begun(np.array(answer[: len(answer) - (answer[-1:] == [EOS])], np.int32))
            if len(begun.tokens) < max_tokens:
                request = replace(request, begun=begun)
        requests.append(request)
    return requests


def expected_output(request: Request, end: int) -> tuple[list[int], str]:
    """What the fake model answers, alone in the world."""
    tokens = request.prompt.tolist()
    output: list[int] = []
    while len(output) < request.sampling.max_tokens:
        if end and len(output) + 1 == abs(end):
            return ([*output, EOS], "stop") if end > 0 else (output, "error")
        output.append(next_token((*tokens, *output)))
    return output, "length"


def run(case: Case) -> Scheduler:
    """Run `case` and check all that must hold meanwhile."""
    return run_counted(case).scheduler


class Ran(NamedTuple):
    """How a case went: `ahead` tokens were computed before anybody knew them."""

    scheduler: Scheduler
    visits: int
    ahead: int


def take_in(scheduler: Scheduler, micro_batch: int, results: deque[VisitResult], but: int = 0) -> list[Completion]:
    """Commit `results`, oldest first, all but so many."""
    completions = []
    while len(results) > but:
        assert len(results[0].tokens) == scheduler.awaited(micro_batch)
        completions += scheduler.commit(micro_batch, results.popleft())
    return completions


def run_counted(case: Case) -> Ran:
    """Run `case` as the pipeline would, with a trip of `rounds` visits."""
    requests = requests_of(case)
    ends = {request.custom_id: end for request, (_, _, end) in zip(requests, case.prompts, strict=True)}
    scheduler = case.scheduler(Source(deque(requests), case.pause))
    engine, completions = Engine(case), []
    under_way: dict[int, deque[VisitResult]] = defaultdict(deque)
    sampled_last: dict[int, dict[int, int]] = {}  # by micro-batch and slot
    turn, visits, ahead = deque(range(case.rounds)), 0, 0
    # Far more visits than any order of the work needs: every token alone, thrice over, in one round of many.
    work = sum(length + max_tokens for length, max_tokens, _ in case.prompts) * (2 if case.undecided else 1)
    most = 50 + case.rounds * (case.pause + 2) * 3 * work * (1 + len(case.losses) + len(case.requeued))
    while turn:
        micro_batch = turn.popleft()
        if visits in case.losses:
            scheduler.requeue_all()
            assert scheduler.pages.all_free
            under_way.clear()
            engine.lose()
        results = under_way[micro_batch]
        completions += take_in(scheduler, micro_batch, results, int(case.ahead))
        if visits in case.requeued and len(slots := scheduler.micro_batches[micro_batch].slots):
            completions += take_in(scheduler, micro_batch, results)
            slots = scheduler.micro_batches[micro_batch].slots
            for slot in slots[visits % max(1, len(slots)) :][:1].tolist():
                scheduler.rounds.requeue(micro_batch, slot)
        digests = scheduler.pages.prefixes.digests
        prefixes = {page: (digest, engine.tokens(page)) for page, digest in digests.items()}
        planned = scheduler.plan_ahead(micro_batch) if results else None
        if planned is None:
            completions += take_in(scheduler, micro_batch, results)
            planned = scheduler.plan(micro_batch)
        plan, tokens = planned
        ahead += int((tokens == PENDING).sum())
        visits += 1
        assert visits < most, "a sequence starves"
        check_plan(plan, tokens, case)
        check_owners(scheduler, engine, case)
        stops = {}
        for slot in plan.slots.tolist():
            request = scheduler.sequences.request(slot)
            if end := ends[request.custom_id]:
                length = len(request.prompt) + abs(end) - 1
                stops[slot] = length if end > 0 else -length
        for at in np.flatnonzero(tokens == PENDING).tolist():  # decode rows come first
            tokens[at] = max(0, sampled_last[micro_batch][int(plan.slots[at])])
        sampled = np.array(engine.visit(plan, tokens, stops), np.int32)
        row = plan.sampled_positions()[0]
        sampled_last[micro_batch] = dict(zip(plan.slots[row].tolist(), sampled.tolist(), strict=True))
        scores = np.zeros((plan.scored, SCORE_WIDTH), np.int32)
        if plan.scored:
            scores[:, 0] = plan.scored_positions()[2]
        words = VisitResult(sampled, prompt_beside=scores).encode()
        results.append(VisitResult.decode(words, plan.sampled, plan.scored))
        # Written again it may be: evicted for a prompt that begins alike, or as the token behind it is sampled again.
        for page, digest in scheduler.pages.prefixes.digests.items():
            if page in prefixes and prefixes[page][0] == digest:
                assert engine.tokens(page) == prefixes[page][1], "a prefix page has changed"
        if plan.retires:
            assert not plan.rows
            results.clear()
        else:
            turn.append(micro_batch)
    assert scheduler.finished and not scheduler.in_flight and scheduler.pages.all_free
    check_answers(requests, ends, completions, case.cut)
    sampled = sum(len(completion.tokens) - len(completion.request.begun.tokens) for completion in completions)
    assert scheduler.output_tokens == sampled
    return Ran(scheduler, visits, ahead)


def check_plan(plan: VisitPlan, tokens: np.ndarray, case: Case) -> None:
    """Budgets are kept, and the plan travels unharmed."""
    assert plan.tokens == len(tokens) <= case.max_batch_tokens
    assert plan.rows <= case.micro_batch_size and len(set(plan.slots.tolist())) == plan.rows
    words = plan.encode()
    assert len(words) <= VisitPlan.max_words(
        case.concurrency, case.main + case.swap, case.max_batch_tokens, case.window > 0
    )
    again = VisitPlan.decode(words)
    for name, value in vars(plan).items():
        assert (
            all(map(np.array_equal, getattr(again, name), value))
            if name == "admissions"
            else np.array_equal(getattr(again, name), value)
        ), name
    if POLICIES[case.policy].alone and (plan.new_tokens > plan.samples).any():
        assert plan.rows == 1


def check_owners(scheduler: Scheduler, engine: Engine, case: Case) -> None:
    """No page but a prefix page has two owners, and none is lost: main pages over all micro-batches, swap pages within
    each."""
    main: list[int] = []
    pages, prefixes = scheduler.pages, scheduler.pages.prefixes
    private: list[int] = []
    for index, batch in enumerate(scheduler.micro_batches):
        swap: list[int] = []
        assert len(batch.slots) <= case.micro_batch_size
        for slot in batch.slots.tolist():
            held = scheduler.pages.owned(slot).tolist()
            main += [page for page in held if page < case.main]
            swap += [page for page in held if page >= case.main]
            shared = int(pages.shared[slot])
            assert prefixes.held[held[:shared]].all()
            private += [page for page in held[shared:] if page < case.main]
        assert len(swap) == len(set(swap)) == case.swap - scheduler.pages.free_swap(index)
        assert scheduler.pages.worst[index] == sum(
            -(-(scheduler.sequences.end[slot] - 1) // case.page_size) - pages.shared[slot]
            for slot in batch.slots.tolist()
        )
    assert len(private) == len(set(private)) and not prefixes.held[private].any()
    assert len(set(main)) == case.main - pages.free_main
    assert np.array_equal(np.bincount(main, minlength=case.main), pages.readers)
    assert prefixes.unread == (prefixes.held & (pages.readers == 0)).sum()
    if pages.sliding is not None:
        check_sliding(pages.sliding, scheduler.sequences.slots, case)


def check_sliding(sliding: SlidingPages, slots: list[int], case: Case) -> None:
    """No page but a prefix page is held twice, none is lost, and nobody holds more than has been reserved."""
    held = [sliding.owned(slot) for slot in slots]
    assert all(len(pages) <= most_sliding(case.window, case.page_size) for pages in held)
    readers = np.bincount(np.concatenate([np.zeros(0, np.int32), *held]), minlength=case.sliding)
    assert np.array_equal(readers, sliding.readers) and sliding.prefixes.held[readers > 1].all()
    assert np.count_nonzero(readers) + sliding.free == case.sliding
    assert sliding.prefixes.unread == (sliding.prefixes.held & (readers == 0)).sum()


def check_answers(requests: list[Request], ends: dict[str, int], completions: list[Completion], cut: int) -> None:
    """Every request is answered once, with what the fake model says without any batching."""
    assert sorted(c.request.custom_id for c in completions) == sorted(r.custom_id for r in requests)
    for completion in completions:
        request = completion.request
        output, reason = expected_output(request, ends[request.custom_id])
        text = request.custom_id if cut and len(output) >= cut else None
        if text is not None:
            output, reason = output[:cut], "stop"
        said = completion.tokens.tolist(), completion.finish_reason, completion.text
        assert said == (output, reason, text), request.custom_id
        scores = completion.prompt_beside
        assert (scores is None) == (request.sampling.prompt_logprobs is None)
        if scores is not None:  # each position once, in their order
            assert scores[:, 0].tolist() == [*range(1, len(request.prompt))]


@st.composite
def cases(draw: Any) -> Case:
    """Any workload in any room that holds its longest request."""
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    lengths = st.integers(1, 40)
    prompts = draw(st.lists(st.tuples(lengths, lengths, st.integers(-20, 20)), max_size=20))
    longest = max((length + max_tokens - 1 for length, max_tokens, _ in prompts), default=1)
    least = -(-longest // page_size)
    swap = draw(st.integers(0, 2 * least))
    common = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=20)
    return Case(
        prompts,
        policy=draw(st.sampled_from(sorted(POLICIES))),
        rounds=draw(st.integers(1, 5)),
        page_size=page_size,
        main=max(1, least - swap) + draw(st.integers(0, 3 * least)),
        swap=swap,
        height=draw(st.integers(0, 8)),
        micro_batch_size=draw(st.integers(1, 8)),
        max_batch_tokens=draw(st.integers(1, 64)),
        concurrency=draw(st.integers(1, 24)),
        pause=draw(st.integers(0, 3)),
        gather=draw(st.booleans()),
        drafts=draw(st.sampled_from([0, 0, -1, 1, 4])),
        losses=tuple(draw(st.lists(st.integers(1, 60), max_size=2))),
        undecided=draw(st.sampled_from((0, 0, 1, 3))),
        requeued=tuple(draw(st.lists(st.integers(1, 60), max_size=4))),
        common=tuple(draw(common)),
        share=draw(st.sampled_from([True, True, True, False])),
        grouped=draw(st.booleans()),
        mixed=draw(st.booleans()),
        stop_token=draw(st.booleans()),
        begun=tuple(draw(st.lists(st.integers(0, 40), max_size=8))),
        window=draw(st.sampled_from([0, 1, 2, 5, 16])),
        slides=draw(st.integers(1, 4)),
        cut=draw(st.sampled_from([0, 0, 1, 3, 12])),
        ahead=draw(st.booleans()),
    )


@settings(max_examples=300)
@given(cases())
def test_every_request_is_answered_from_its_own_context(case: Case) -> None:
    run(case)


@settings(max_examples=300)
@given(cases())
def test_visits_that_are_planned_ahead_change_no_answer(case: Case) -> None:
    run(replace(case, rounds=1, ahead=True))


@pytest.mark.parametrize(("undecided", "drafts"), [(0, 0), (3, 0), (0, -1)])
def test_the_only_round_is_planned_ahead(undecided: int, drafts: int) -> None:
    """All tokens but the first of each answer, and those that come by asking again, are computed before they are known.
    A sequence that ends early takes a row of one visit more, and the next request its place."""
    prompts = [(6, 12, 0), (6, 12, 5), (6, 1, 0), (6, 12, -7), (9, 12, 0), (6, 12, 0)]
    case = Case(prompts, rounds=1, main=100, max_batch_tokens=64, ahead=True, undecided=undecided, drafts=drafts)
    ran, before = run_counted(case), run_counted(replace(case, ahead=False))
    answered = ran.scheduler.output_tokens
    assert ran.ahead > (answered / 2 if drafts else answered - 12)
    if drafts:  # told of every row, for the tokens of a trip
        assert cast(Guesses, ran.scheduler._drafter).rows >= answered - len(prompts)
    assert undecided or ran.visits <= before.visits + 2


def test_what_is_abandoned_is_not_planned_ahead() -> None:
    case = Case([(6, 12, 0)], rounds=1, main=100)
    scheduler = case.scheduler(Source(deque(requests_of(case))))
    plan, _ = scheduler.plan(0)
    assert scheduler.plan_ahead(0) is not None
    scheduler.commit(0, VisitResult(np.full(plan.sampled, 500, np.int32)))
    assert [request.begun.tokens.tolist() for request in scheduler.unfinished()] == [[500]]  # no PENDING
    scheduler.abandon()
    assert scheduler.plan_ahead(0) is None and scheduler.plan(0)[0].retires


@st.composite
def alike(draw: Any) -> Case:
    """Prompts that part within a page, in little memory."""
    page_size = draw(st.sampled_from([2, 4, 8]))
    shared = draw(st.lists(st.integers(9, 30), min_size=4, max_size=20))
    own = st.tuples(st.integers(2, 12), st.integers(1, 6))
    prompts = [(common + length, answer, 0) for common, (length, answer) in ((each, draw(own)) for each in shared)]
    least = max(-(-(length + answer - 1) // page_size) for length, answer, _ in prompts)
    swap = draw(st.integers(0, least))
    return Case(
        prompts,
        policy=draw(st.sampled_from(sorted(POLICIES))),
        rounds=draw(st.integers(1, 3)),
        page_size=page_size,
        main=max(2, least - swap) + draw(st.integers(0, 2 * least)),
        swap=swap,
        height=draw(st.integers(0, 6)),
        max_batch_tokens=draw(st.integers(4, 40)),
        concurrency=draw(st.integers(1, 8)),
        common=tuple((draw(st.integers(0, 1)), each) for each in shared),
        grouped=draw(st.booleans()),
    )


@settings(max_examples=300)
@given(alike())
def test_whoever_parts_within_a_page_begins_with_a_copy_of_it(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_suspended_sequences_lose_nothing(policy: str) -> None:
    """Memory for the longest sequence and hardly more: most wait in the host pool, and none is computed again."""
    case = Case([(6, 30, 0)] * 8, policy, rounds=3, main=12, height=7, max_batch_tokens=16)
    scheduler = run(case)
    assert scheduler.counters.suspensions and scheduler.counters.resumptions == scheduler.counters.suspensions
    assert not scheduler.counters.recomputed_tokens


@pytest.mark.parametrize("main", [28, 36, 600])
@pytest.mark.parametrize("drafts", [0, 3])
def test_the_last_token_of_a_shared_prompt_is_asked_for_again(main: int, drafts: int) -> None:
    """With pages of one token, a prompt's last page is a prefix page that longer prompts read while it is written anew;
    and whoever is suspended between the two has more prefix pages than computed tokens."""
    prompts = [(12, 9, 0), (12, 9, 0), (20, 9, 0), (12, 1, 0), (16, 9, 0)] * 4
    common = ((0, 12), (0, 12), (0, 12), (0, 12), (0, 16)) * 4
    case = Case(
        prompts, page_size=1, main=main, height=7, max_batch_tokens=64, common=common, drafts=drafts, undecided=1
    )
    for policy in sorted(POLICIES):
        scheduler = run(replace(case, policy=policy))
        assert bool(scheduler.counters.suspensions) == (main < 600)


def test_without_a_host_pool_only_what_fits_to_its_end_is_admitted() -> None:
    scheduler = run(Case([(6, 30, 0)] * 8, rounds=3, main=12, height=0, max_batch_tokens=16))
    assert not scheduler.counters.suspensions and not scheduler.counters.recomputed_tokens


def test_what_is_lost_is_computed_again() -> None:
    scheduler = run(Case([(6, 30, 0)] * 8, rounds=3, main=60, losses=(9, 40), requeued=(20,)))
    assert scheduler.counters.recomputed_tokens > 2 * 8 * 6


def test_rounds_close_at_the_end_if_that_shortens_the_cycle() -> None:
    """Uneven answers in four rounds: all are gathered, or as many as latency leaves idle."""
    prompts = [(6, 4 + 3 * index, 0) for index in range(16)]
    visits = {}
    for latency in (0, 2, 4):
        case = Case(prompts, rounds=4, main=200, concurrency=16, gather=True, latency=latency)
        scheduler, visited, _ = run_counted(case)
        visits[latency] = visited
        assert bool(scheduler.counters.moved_to_other_rounds) == (latency < 4) and not scheduler.counters.suspensions
    assert visits[0] < visits[2] < visits[4] and visits[0] < 0.8 * visits[4]


def test_sequences_with_swap_pages_change_rounds_by_way_of_the_host_pool() -> None:
    case = Case([(6, 10 + 5 * index, 0) for index in range(8)], rounds=4, main=100, swap=8, height=8, gather=True)
    scheduler = run(case)
    counters = scheduler.counters
    assert counters.moved_to_other_rounds and counters.suspensions == counters.resumptions > 0
    assert not counters.recomputed_tokens
    # Nobody is moved that the host pool does not take.
    assert not run(replace(case, height=0)).counters.suspensions


class Unhurried(ThreadPoolExecutor):
    """Does what it is given to do when somebody asks for the result."""

    def submit(self, work: Any, /, *arguments: Any) -> Any:
        return SimpleNamespace(result=cache(partial(work, *arguments)))


@pytest.mark.parametrize("drafts", [0, 3])
def test_visits_do_not_depend_on_when_stop_strings_are_found(monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    """A sequence ends with its next sample, which is dropped: a visit each, and no more."""
    case = Case([(6, 30, 0)] * 8, rounds=2, main=100, cut=5, drafts=drafts)
    at_once = run_counted(case).visits
    monkeypatch.setattr(sequences_module, "ThreadPoolExecutor", Unhurried)
    assert run_counted(case).visits == at_once
    if not drafts:
        by_length = run_counted(replace(case, prompts=[(6, 6, 0)] * 8, cut=0)).visits
        assert at_once == by_length


def test_what_a_stop_string_cuts_off_leaves_no_trace() -> None:
    """Neither the log-probabilities of what was sampled behind it, nor that nothing could be sampled there."""
    case = Case([], rounds=1, cut=2)
    sampling = SamplingParams(9, stop=("stop",), logprobs=0)
    request = Request("r", np.array([1, 2], np.int32), sampling)
    for late in (30, NO_TOKEN):
        scheduler = case.scheduler(Source(deque([request])))
        completions = []
        for token in (10, 20, late):
            scheduler.plan(0)
            completions += scheduler.commit(0, VisitResult(np.array([token], np.int32), np.array([[token]], np.int32)))
        (completion,) = completions
        assert completion.tokens.tolist() == [10, 20] and completion.finish_reason == "stop"
        assert completion.beside is not None and completion.beside.tolist() == [[10], [20]]


def test_no_request_is_a_job_too() -> None:
    run(Case([]))


def test_policies_order_a_visit() -> None:
    """A prompt of 6 tokens comes while a sequence decodes: what the next visit holds."""
    held = {"vanilla": [6], "prefill_first": [1, 6], "decode_first": [1, 6]}
    tight = {"vanilla": [4], "prefill_first": [4], "decode_first": [1, 3]}
    for budget, wanted in ((8, held), (4, tight)):
        for policy, expected in wanted.items():
            case = Case([(3, 9, 0), (6, 9, 0)], policy, rounds=1, max_batch_tokens=budget)
            first, second = requests_of(case)
            source = Source(deque([first]))
            scheduler = case.scheduler(source, eos_ids=())
            plan, _ = scheduler.plan(0)
            assert plan.new_tokens.tolist() == [3]
            source.requests.append(second)
            scheduler.commit(0, VisitResult(np.array([1], np.int32)))
            plan, _ = scheduler.plan(0)
            assert plan.new_tokens.tolist() == expected, (policy, budget)


@settings(max_examples=200)
@given(st.integers(0, 8), st.lists(st.tuples(st.booleans(), st.integers(0, 300)), max_size=60))
def test_buddy_allocator(height: int, steps: list[tuple[bool, int]]) -> None:
    """Whatever is taken and given back, in whatever pieces: no page twice, none lost, one block at the end."""
    buddy = BuddyAllocator(height)
    assert buddy.pages == (2 ** (height - 1) if height else 0)
    owned: list[int] = []
    for takes, count in steps:
        if takes:
            pages = buddy.take(min(count, buddy.free_pages)).tolist()
            assert not set(pages) & set(owned) and len(set(pages)) == len(pages)
            owned += pages
        else:
            given_back, owned = owned[: count % 7 + 1], owned[count % 7 + 1 :]
            buddy.give(np.array(given_back, np.int32))
        assert buddy.free_pages == buddy.pages - len(owned)
        assert all(0 <= page < buddy.pages for page in owned)
    buddy.give(np.array(owned, np.int32))
    assert buddy.all_free
    assert buddy.take(buddy.pages).tolist() == list(range(buddy.pages))


@pytest.mark.parametrize("case", [Case(prompts=(), policy=policy) for policy in ("prefill_first", "decode_first")])
def test_visits_do_not_depend_on_the_speed_of_reading(case: Case) -> None:
    """Where the reader is waited for: two runs make the same plans."""

    def plans(pauses: set[int]) -> list[list[int]]:
        def items() -> Iterator[Request]:
            for number in range(40):
                if number in pauses:
                    time.sleep(0.01)
                prompt = np.arange(number, number + 3 + number % 7, dtype=np.int32)
                yield Request(f"{number}", prompt, SamplingParams(max_tokens=1 + number % 5))

        ahead = ReadAhead(items(), set(), lambda request: request, lambda item: None, 8, until=lambda: False)
        scheduler, made = case.scheduler(ahead), []
        turn = deque((index, np.zeros(0, np.int32)) for index in range(case.rounds))
        while turn:
            micro_batch, sampled = turn.popleft()
            scheduler.commit(micro_batch, VisitResult(sampled))
            plan, _ = scheduler.plan(micro_batch)
            made.append(plan.encode().tolist())
            if not plan.retires:
                turn.append((micro_batch, np.full(plan.sampled, 5, np.int32)))
        return made

    assert plans(set()) == plans({0, 5, 6, 30}) == plans(set(range(20, 40)))
