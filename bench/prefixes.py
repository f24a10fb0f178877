"""What sharing prefixes saves, in tokens and memory: the scheduler alone, on prompts without a model.

    python -m bench.prefixes

A system prompt, one of 50 documents and one of 20 questions in each of 1,000 prompts, in random order: the prompt
tokens that are computed, with memory for all and for a tenth of it. Then the host memory of rank 0 with prompts that
share nothing. Counts, not times: they are the same on every machine.
"""

import random
import tracemalloc
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.timing import table
from deserve.batch import IntArray, Request, SamplingParams, VisitResult
from deserve.layout import Layout
from deserve.scheduler.scheduler import Scheduler

PAGE = 16
VOCABULARY = 50_000
ANSWER = 32  # tokens
SYSTEM = 192
FEW, MANY = 20_000, 200_000  # prompts that share nothing
OWN = 64  # tokens of each of these


@dataclass
class Source:
    """Requests as they are asked for."""

    requests: Iterator[Request]
    exhausted: bool = False

    def poll(self) -> Request | None:
        request = next(self.requests, None)
        self.exhausted = request is None
        return request


def levels(chance: np.random.Generator, aligned: bool) -> tuple[list[IntArray], list[tuple[int, int]]]:
    """The prompts, and of each its document and the tokens before its question. `aligned`: documents fill pages."""

    def text(least: int, most: int) -> IntArray:
        length = int(chance.integers(least, most + 1))
        return chance.integers(0, VOCABULARY, length // PAGE * PAGE if aligned else length).astype(np.int32)

    system = text(SYSTEM, SYSTEM)
    documents = [text(500, 1500) for _ in range(50)]
    prompts, parts = [], []
    for number, document in enumerate(documents):
        for _ in range(20):
            question = chance.integers(0, VOCABULARY, int(chance.integers(10, 60))).astype(np.int32)
            prompts.append(np.concatenate([system, document, question]))
            parts.append((number, len(system) + len(document)))
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    return [prompts[index] for index in order], [parts[index] for index in order]


def least(prompts: list[IntArray], page: int) -> int:
    """The prompt tokens that must be computed if whole pages of `page` tokens are computed once each."""
    seen: set[bytes] = set()
    tokens = 0
    for prompt in prompts:
        ends = range(page, len(prompt), page)  # the last token is always computed
        known = next((end for end in reversed(ends) if prompt[:end].tobytes() in seen), 0)
        seen.update(prompt[:end].tobytes() for end in ends if end > known)
        tokens += len(prompt) - known
    return tokens


def computed(requests: Iterator[Request], main_pages: int, order: str, share: bool = True) -> int:
    """The prompt tokens that a job of two rounds computes."""
    layout = Layout((0,), 2, 16, 32, 512, "prefill_first", PAGE, main_pages, 0, 1)
    scheduler = Scheduler(layout, Source(requests), share_prefixes=share, grouped=order == "auto")
    turn = deque((index, np.zeros(0, np.int32)) for index in range(layout.rounds))
    tokens = 0
    while turn:
        micro_batch, sampled = turn.popleft()
        scheduler.commit(micro_batch, VisitResult(sampled))
        plan, _ = scheduler.plan(micro_batch)
        ahead = scheduler.sequences.prompt_length[plan.slots] - plan.context
        tokens += int(np.clip(ahead, 0, plan.new_tokens).sum())
        if not plan.retires:
            turn.append((micro_batch, np.zeros(plan.sampled, np.int32)))
    return tokens


def requests_of(prompts: Iterator[IntArray]) -> Iterator[Request]:
    sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    return (Request(f"{number}", prompt, sampling) for number, prompt in enumerate(prompts))


def multi_level() -> None:
    """Documents whose ends fill pages, and documents of any length."""
    for aligned in (True, False):
        prompts, parts = levels(np.random.default_rng(0), aligned)
        by_page, by_token = least(prompts, PAGE), least_by_token(prompts, parts)
        documents = len({number for number, _ in parts})
        whole = by_page // PAGE + len(prompts)  # pages, about
        lines = []
        for memory, pages in (("all", whole + 32 * ANSWER), ("a tenth", whole // 10)):
            for order in ("auto", "file"):
                tokens = computed(requests_of(iter(prompts)), pages, order)
                over = (f"{100 * (tokens / floor - 1):.1f} %" for floor in (by_page, by_token))
                lines.append([memory, order, f"{tokens:,}", *over])
        every = sum(map(len, prompts))
        lines.append(
            ["all", "not shared", f"{every:,}", *(f"{100 * (every / f - 1):.0f} %" for f in (by_page, by_token))]
        )
        ends = "filled pages" if aligned else "any length"
        floors = f"at least {by_page:,} tokens by pages, {by_token:,} by tokens"
        title = f"{len(prompts):,} prompts, {documents} documents of {ends}: {floors}"
        table(title, ["memory for", "order", "computed", "over pages' least", "over tokens' least"], lines)


def least_by_token(prompts: list[IntArray], parts: list[tuple[int, int]]) -> int:
    """The same if the system prompt, each document and each question were computed once, to the token."""
    documents = sum(before - SYSTEM for before in dict(parts).values())
    questions = sum(len(prompt) - before for prompt, (_, before) in zip(prompts, parts, strict=True))
    return SYSTEM + documents + questions


def nothing_shared() -> None:
    """The most memory that Python's objects take beside the prompts' own."""
    lines = []
    for count in (FEW, MANY):
        chance = np.random.default_rng(0)
        for share in (False, True):
            prompts = (chance.integers(0, VOCABULARY, OWN).astype(np.int32) for _ in range(count))
            tracemalloc.start()
            tokens = computed(requests_of(prompts), 4000, "auto", share)
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            lines.append([f"{count:,}", "shared" if share else "not shared", f"{tokens:,}", f"{most / 1e6:.1f}"])
    table(f"Prompts of {OWN} tokens without a common beginning", ["prompts", "", "computed", "MB at most"], lines)


if __name__ == "__main__":
    multi_level()
    nothing_shared()
