"""Prefix pages, and the order of requests that share some. With all of the scheduler: `test_scheduler.py`."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import Case, Source, requests_of, run

from deserve.batch import IntArray, Request, SamplingParams, VisitResult, shared_tokens
from deserve.layout import Layout
from deserve.scheduler.pages import Pages
from deserve.scheduler.prefixes import Chain
from deserve.scheduler.scheduler import Scheduler
from deserve.scheduler.window import Window

PAGE = 2
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9).map(np.int32), min_size=1, max_size=12)


def chain(prompt: IntArray) -> Chain:
    return Chain(prompt, PAGE)


def chain_of(request: Request) -> Chain:
    return chain(request.prompt)


@given(PROMPTS)
def test_a_digest_says_all_that_a_page_depends_on(prompts: list[IntArray]) -> None:
    """Two pages have the same digest where all tokens up to their end are the same, and only there."""
    seen: dict[bytes, bytes] = {}
    for prompt in prompts:
        links = chain(prompt)
        assert links.pages == len(prompt) // PAGE and links.readable * PAGE < len(prompt)
        for index in reversed(range(links.pages)):
            tokens = prompt[: (index + 1) * PAGE].tobytes()
            assert seen.setdefault(links[index], tokens) == tokens
    assert len(set(seen.values())) == len(seen)


@settings(max_examples=300)
@given(PROMPTS, st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=60), st.integers(5, 12))
def test_pages_are_evicted_oldest_first_and_from_the_ends_of_chains(
    prompts: list[IntArray], steps: list[tuple[int, bool]], main: int
) -> None:
    """Sequences come and go at random; a prefix page goes only when all free ones are taken, and no sooner than others
    that were read longer ago, or that hold what comes after it."""
    pages = Pages(main, 0, 1, 0, PAGE, 12)
    last_read: dict[int, int] = {}
    for now, (slot, finishes) in enumerate(steps):
        prompt = prompts[slot % len(prompts)]
        if len(pages.owned(slot)):
            last_read |= dict.fromkeys(pages.owned(slot).tolist(), now)
            pages.computes(0, slot, len(prompt) if finishes else len(prompt) // 2)
            pages.release(0, slot)
            continue
        links = pages.chain(Request("", prompt))
        found = pages.prefixes.find(links, links.readable)
        if pages.count(len(prompt)) - len(found) + pages.unread(found) > pages.free_main:
            continue
        before = {page: digest for page, digest in pages.prefixes.digests.items() if not pages.readers[page]}
        unread = {page for page in before if page not in found.tolist()}
        pages.begin(0, slot, len(prompt), links, found, links.pages * PAGE)
        pages.grow(0, np.array([slot]), np.array([len(prompt)]))
        evicted = {page for page in unread if pages.prefixes.digests.get(page) != before[page]}
        if evicted:
            assert pages.free_main == pages.prefixes.unread
            assert max(last_read[page] for page in evicted) <= min(
                (last_read[page] for page in unread - evicted), default=now
            )
        held = set(pages.prefixes.digests.values())
        for other in prompts:
            links = chain(other)
            within = [links[index] in held for index in range(links.pages)]
            assert within == sorted(within, reverse=True), "a page is kept whose parent is gone"
    for slot in range(12):
        if len(pages.owned(slot)):
            pages.release(0, slot)
    assert pages.all_free and not pages.worst.any() and not pages.prefixes.read
    pages.forget_prefixes()
    assert not pages.prefixes.unread and pages.free_main == main and not pages.prefixes.held.any()


@pytest.mark.parametrize(("main", "alike"), [(2, 0), (3, 1)])
def test_a_copy_has_a_page_beside_those_that_its_sequence_reads(main: int, alike: int) -> None:
    """Nobody reads these so far, and so they count as free: one is left for the copy, or there is none."""
    pages = Pages(main, 4, 1, 0, PAGE, 2)
    first, second = (chain(np.array(prompt, np.int32)) for prompt in ([1, 2, 3, 4, 5], [1, 2, 3, 9, 5]))
    pages.begin(0, 0, 5, first, np.zeros(0, np.int32), 2 * PAGE)
    pages.computes(0, 0, 4)
    pages.planned()
    pages.release(0, 0)
    found = pages.prefixes.find(second, second.readable)
    copied = pages.longest(second, found)
    assert pages.free_main == main and len(found) == 1 and copied[1] == alike
    own = pages.begin(0, 1, 5, second, found, None, copied)[:, 2].tolist()
    assert own[:1] == found.tolist() and len(own) == 1 + alike
    if alike:
        assert pages.copy(copied[0], 1).tolist() == [[copied[0], own[1]]]


@settings(max_examples=300)
@given(PROMPTS, st.booleans(), st.booleans(), st.integers(1, 12), st.data())
def test_every_request_leaves_the_window_once(
    prompts: list[IntArray], grouped: bool, mixed: bool, size: int, data: st.DataObject
) -> None:
    """It knows what each shares with the others; and one that begins like others before it is offered first."""
    answers = data.draw(st.lists(st.integers(1, 99), min_size=len(prompts), max_size=len(prompts)))
    requests = [
        Request(f"{index}", prompt, SamplingParams(answer))
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    window = Window(Source(deque(requests)), chain_of, PAGE, size, grouped, mixed)
    taken: list[Request] = []
    window.fill()
    while not window.exhausted:
        inside = list(window.candidates())
        assert len(inside) == len(window) <= size
        if not grouped and not mixed:
            assert [waiting.number for waiting in inside] == sorted(waiting.number for waiting in inside)
        elif (
            grouped
            and taken
            and max(shared_tokens(taken[-1].prompt, waiting.request.prompt) for waiting in inside) >= PAGE
        ):
            assert max(shared_tokens(inside[0].request.prompt, request.prompt) for request in taken) >= PAGE
        waiting = data.draw(st.sampled_from(inside))
        others = [other.request.prompt for other in inside if other is not waiting]
        shared = max((shared_tokens(waiting.request.prompt, other) for other in others), default=0)
        assert window.shared_with_others(waiting) == (shared if shared >= PAGE else 0)
        window.take(waiting)
        taken.append(waiting.request)
        window.fill()
    assert sorted(request.custom_id for request in taken) == sorted(request.custom_id for request in requests)


def test_long_prompts_are_mixed_with_long_answers() -> None:
    """First all with long prompts, then all with long answers, then both in turn: they leave in proportion, the oldest
    of each kind first; and requests alike keep their order."""
    kinds = [(90, 10)] * 30 + [(10, 90)] * 30 + [(90, 10), (10, 90)] * 15
    requests = [
        Request(f"{index}", np.full(prompt, index, np.int32), SamplingParams(answer))
        for index, (prompt, answer) in enumerate(kinds)
    ]
    window = Window(Source(deque(requests)), chain_of, PAGE, 100, False, True)
    window.fill()
    left = []
    while len(window):
        left.append(next(window.candidates()))
        window.take(left[-1])
    excess = np.cumsum([waiting.prompt - waiting.answer for waiting in left])
    assert np.abs(excess).max() <= 4 * 80
    for kind in ((90, 10), (10, 90)):
        numbers = [waiting.number for waiting in left if (waiting.prompt, waiting.answer) == kind]
        assert numbers == sorted(numbers) and len(numbers) == 45
    alike = [Request(f"{index}", np.full(9, index, np.int32), SamplingParams(9)) for index in range(20)]
    window = Window(Source(deque(alike)), chain_of, PAGE, 8, False, True)
    for index in range(20):
        window.fill()
        waiting = next(window.candidates())
        assert waiting.number == index
        window.take(waiting)


def computed(scheduler: Scheduler, rounds: int) -> tuple[int, list[str]]:
    """Prompt tokens that a job computes whose answers have one token, and its requests as they finish."""
    tokens, order = 0, []
    turn = deque((index, 0) for index in range(rounds))
    while turn:
        index, sampled = turn.popleft()
        completions = scheduler.commit(index, VisitResult(np.zeros(sampled, np.int32)))
        order += [completion.request.custom_id for completion in completions]
        plan, _ = scheduler.plan(index)
        tokens += plan.tokens
        if not plan.retires:
            turn.append((index, plan.sampled))
    return tokens, order


def layout(rounds: int, main: int, swap: int = 0) -> Layout:
    return Layout((0,), rounds, 16, 16 * rounds, 64, "prefill_first", 16, main, swap, 12)


def documents(length: int) -> tuple[list[Request], int]:
    """A system prompt, 20 documents of `length` tokens, 10 questions about each, in random order; and the tokens that
    must be computed."""
    random = np.random.default_rng(0)
    system = random.integers(2**30, size=64)
    prompts = []
    for _ in range(20):
        document = random.integers(2**30, size=length)
        prompts += [np.concatenate([system, document, random.integers(2**30, size=17)]) for _ in range(10)]
    random.shuffle(prompts)
    requests = [Request(f"{index}", prompt.astype(np.int32), SamplingParams(1)) for index, prompt in enumerate(prompts)]
    return requests, 64 + 20 * (length + 10 * 17)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("swap", [0, 40])
@pytest.mark.parametrize("length", [160, 167])
def test_a_prefix_is_computed_once(rounds: int, swap: int, length: int) -> None:
    """In any order while memory holds all prefixes, in groups with a fraction of that.

    A page that it fills in part is computed again by who comes in the visit that writes it, and copied by the others.
    """
    requests, least = documents(length)
    filled = length % 16 == 0
    everything = (64 + 20 * length) // 16
    for main, grouped in [(everything + 300, False), (everything + 300, True), (everything // 10 + 100, True)]:
        scheduler = Scheduler(layout(rounds, main, swap), Source(deque(requests)), share_prefixes=True, grouped=grouped)
        tokens, order = computed(scheduler, rounds)
        assert sorted(order) == sorted(request.custom_id for request in requests)
        most = 1.03 if filled else 1.05 if main > everything else 1.15
        assert least <= tokens <= most * least, (main, grouped)
    scheduler = Scheduler(
        layout(rounds, everything // 10 + 100, swap), Source(deque(requests)), share_prefixes=True, grouped=False
    )
    assert computed(scheduler, rounds)[0] > 1.5 * least
    assert scheduler.pages.prefixes.evicted


def test_who_shares_a_prompt_that_is_being_computed_waits_for_it_and_others_do_not() -> None:
    """A prompt of 200 tokens in visits of 64: its twins come when it is done, a stranger at once."""
    prompt = np.arange(200, dtype=np.int32)
    twins = [Request(f"twin-{index}", np.append(prompt, np.int32(index)), SamplingParams(1)) for index in range(3)]
    stranger = Request("stranger", np.arange(300, 310, dtype=np.int32), SamplingParams(1))
    for grouped in (False, True):
        source = Source(deque([*twins, stranger]))
        scheduler = Scheduler(layout(2, 100), source, share_prefixes=True, grouped=grouped)
        assert scheduler.plan(0)[0].new_tokens.tolist() == [64]
        assert scheduler.plan(1)[0].new_tokens.tolist() == [10]  # the stranger
        scheduler.commit(0, VisitResult(np.zeros(0, np.int32)))
        assert scheduler.plan(0)[0].new_tokens.tolist() == [64]
        assert scheduler.plan(0)[0].new_tokens.tolist() == [64]
        # 192 of 200 tokens are in pages that are full; the other nine are everybody's own, in the same visit.
        assert scheduler.plan(0)[0].new_tokens.tolist() == [9, 9, 9]


def test_only_pages_that_come_again_take_main_pages_from_swap_pages() -> None:
    prompts = [np.arange(100 * index, 100 * index + 64, dtype=np.int32) for index in (1, 2, 3, 3)]
    prompts[3] = np.append(prompts[3][:40], np.arange(50, dtype=np.int32))
    requests = [Request(f"{index}", prompt, SamplingParams(4)) for index, prompt in enumerate(prompts)]
    scheduler = Scheduler(layout(2, 20, 20), Source(deque(requests)), share_prefixes=True)
    scheduler.plan(0)
    scheduler.plan(1)
    scheduler.plan(0)
    scheduler.plan(1)
    held = {
        scheduler.sequences.request(slot).custom_id: (scheduler.pages.owned(slot) < 20).sum()
        for batch in scheduler.micro_batches
        for slot in batch.slots.tolist()
    }
    # Two are shared. The third of them is shared in part: one writes it, and the other begins with a copy.
    assert held == {"0": 0, "1": 0, "2": 3, "3": 3}
    assert 20 - scheduler.pages.free_main == 4


def test_a_suspended_sequence_keeps_its_own_pages_and_finds_the_shared_ones() -> None:
    """Short memory, one stem for all: whoever is suspended stashes what is its own, and computes nothing again."""
    case = Case([(40, 30, 0)] * 8, rounds=3, main=30, height=6, max_batch_tokens=16, common=((0, 36),) * 8)
    scheduler = run(case)
    assert scheduler.counters.suspensions and scheduler.counters.resumptions == scheduler.counters.suspensions
    assert not scheduler.counters.recomputed_tokens
    host = scheduler.pages.host
    assert host.pages - host.least_free < scheduler.counters.suspensions * 9


def test_what_is_shared_is_counted_once_when_requests_are_admitted() -> None:
    """Without a host pool, as many are in flight as fit with one copy of their stem."""
    prompts = [(40, 8, 0)] * 8  # 12 pages each, 9 of them shared
    in_flight = {}
    for share in (False, True):
        case = Case(
            prompts,
            rounds=1,
            main=46,
            height=0,
            micro_batch_size=8,
            max_batch_tokens=400,
            common=((0, 36),) * 8,
            share=share,
        )
        requests = [replace(request, sampling=SamplingParams(8)) for request in requests_of(case)]
        scheduler = case.scheduler(Source(deque(requests)))
        for _ in range(3):  # a visit takes no more entries of page tables than there are pages
            plan, _ = scheduler.plan(0)
            scheduler.commit(0, VisitResult(np.zeros(plan.sampled, np.int32)))
        in_flight[share] = scheduler.in_flight
    assert in_flight[False] == 3 and in_flight[True] == 8


def test_shared_tokens() -> None:
    cases: list[tuple[list[int], list[int], int]] = [
        ([], [], 0),
        ([1], [2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2], [1, 3], 1),
    ]
    for one, other, expected in cases:
        assert shared_tokens(np.array(one, np.int32), np.array(other, np.int32)) == expected
