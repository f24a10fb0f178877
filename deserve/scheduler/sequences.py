"""The sequences in flight: their tokens, how far they are computed, and when they end."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deserve.batch import NO_TOKEN, PENDING, UNDECIDED, IntArray, Ints, Request
from deserve.kvcache.pages import widen
from deserve.scheduler.ids import IdStack, spread

Bools = NDArray[np.bool_]
NO_STOP = np.iinfo(np.int32).min  # no token


class Ending(NamedTuple):
    """A sequence that is complete: the OpenAI `finish_reason`, and the text where a stop string cut it.

    The reason is `error` where NO_TOKEN was sampled, `dead_end` where DEAD_END was.
    """

    slot: int
    reason: str
    text: str | None


class Cut(NamedTuple):
    """Where a stop string ends an answer: after so many output tokens, and the text before it."""

    tokens: int
    text: str


# Where the first stop string ends each request, given the outputs so far; None where there is none yet. May be called
# from several threads, but never at the same time for one request, whose output only grows.
CutFinder = Callable[[Sequence[Request], Sequence[IntArray]], list[Cut | None]]


def never(requests: Sequence[Request], outputs: Sequence[IntArray]) -> list[Cut | None]:
    """No stop string ends an answer."""
    return [None] * len(requests)


class Sequences:
    """Sequences in arrays by slot, so that a visit needs no Python loop over them.

    A sequence has `length` tokens, prompt and output, of which the KV cache holds `computed`. If one is missing it
    decodes, if more are it prefills: a new prompt, or a sequence whose pages were taken. Draft tokens stand behind
    `length` while a visit verifies them. A token that is `assumed` counts before it is known: PENDING stands for it.

    A thread looks for stop strings while the next visits run. Its answer about a sequence is taken in with the
    sequence's next sample, which is dropped if the stop string came before it. Never earlier: otherwise the visits of a
    job would depend on the thread's speed. Sequences that end for another reason are searched at once.
    """

    def __init__(self, slots: int, eos_ids: tuple[int, ...], find_cuts: CutFinder):
        self._eos_ids = np.array(eos_ids, np.int32)
        self._find_cuts = find_cuts
        self._thread = ThreadPoolExecutor(1, "stop strings")
        self._searches: dict[int, tuple[Future[list[Cut | None]], int]] = {}  # by slot, with its place in the result
        self.output_tokens = 0  # so far, those of sequences that were removed too
        self._free = IdStack(np.arange(slots, dtype=np.int32))
        self._requests: list[Request | None] = [None] * slots
        self._tokens = np.zeros((slots, 64), np.int32)
        self.length, self.computed, self.end, self.age = np.zeros((4, slots), np.int64)
        self.prompt_length = np.zeros(slots, np.int64)
        self.cached = np.zeros(slots, np.int64)  # of the prompt, tokens that others had computed at the first start
        self._checked = np.zeros(slots, bool)  # has stop strings
        self._stop_tokens = np.full((slots, 0), NO_STOP, np.int32)
        self._ignore_eos = np.zeros(slots, bool)
        self.guided = np.zeros(slots, bool)  # has a grammar
        self.wavers = np.zeros(slots, bool)  # UNDECIDED may be sampled
        self.assumed = np.zeros(slots, bool)  # the last token is PENDING
        self.undecided = np.zeros(slots, bool)  # the last token asks again, and that is yet to be planned
        self.logprobs = np.full(slots, -1)  # how many are wanted beside each token's own, -1: not even that
        self._added = 0

    @property
    def in_flight(self) -> int:
        """Sequences that have been added and not removed."""
        return len(self._requests) - len(self._free)

    @property
    def free(self) -> int:
        """Slots for further sequences."""
        return len(self._free)

    @property
    def slots(self) -> list[int]:
        """The slots that are taken."""
        return [slot for slot, request in enumerate(self._requests) if request is not None]

    def request(self, slot: int) -> Request:
        """What the sequence in `slot` answers."""
        request = self._requests[slot]
        assert request is not None
        return request

    def output(self, slot: int) -> IntArray:
        """The answer so far, as far as it is known."""
        return self._tokens[slot, len(self.request(slot).prompt) : self.length[slot] - self.assumed[slot]]

    def add(self, request: Request, cached: int = 0) -> int:
        """Give `request` a slot, of which one must be free; of its tokens the first `cached` are computed."""
        slot = int(self._free.take(1)[0])
        prompt, begun, length = len(request.prompt), request.begun, request.length
        self._requests[slot] = request
        self._tokens = widen(self._tokens, length + 1)
        self._tokens[slot, :prompt], self._tokens[slot, prompt:length] = request.prompt, begun.tokens
        self.length[slot], self.computed[slot] = length, cached
        self.cached[slot] = begun.cached_tokens if len(begun.tokens) else cached
        self.prompt_length[slot] = prompt
        self.end[slot] = prompt + request.sampling.max_tokens
        self.age[slot], self._added = self._added, self._added + 1
        self._checked[slot] = bool(request.sampling.stop)
        stop_tokens = request.sampling.stop_token_ids
        more = len(stop_tokens) - self._stop_tokens.shape[1]
        if more > 0:
            self._stop_tokens = np.pad(self._stop_tokens, ((0, 0), (0, more)), constant_values=NO_STOP)
        self._stop_tokens[slot] = NO_STOP
        self._stop_tokens[slot, : len(stop_tokens)] = stop_tokens
        self._ignore_eos[slot] = request.sampling.ignore_eos
        self.guided[slot] = request.sampling.grammar is not None
        self.wavers[slot] = request.sampling.temperature > 0 and (
            request.sampling.top_k > 0 or request.sampling.top_p < 1
        )
        self.undecided[slot] = self.assumed[slot] = False
        self.logprobs[slot] = -1 if request.sampling.logprobs is None else request.sampling.logprobs
        return slot

    def remove(self, slot: int) -> None:
        """Free `slot`."""
        self._searches.pop(slot, None)
        self._requests[slot] = None
        self._free.give(np.array([slot], np.int32))

    def missing(self, slots: Ints) -> Ints:
        """Tokens of `slots` [rows] that the KV cache does not hold: [rows]."""
        return self.length[slots] - self.computed[slots]

    def assume(self, slots: IntArray) -> None:
        """Let each of `slots` [rows] have one more token, which `append` will tell."""
        if len(slots):
            self._tokens = widen(self._tokens, int(self.length[slots].max()) + 1)
            self._tokens[slots, self.length[slots]] = PENDING
            self.length[slots] += 1
            self.assumed[slots] = True

    def withdraw(self, slots: IntArray) -> None:
        """Take back what was assumed of `slots` [rows]."""
        self.length[slots] -= self.assumed[slots]
        self.assumed[slots] = False

    def propose(self, slots: IntArray, counts: IntArray, drafts: IntArray) -> None:
        """Put `counts` [rows] draft tokens behind the sequences of `slots` [rows]; `drafts` holds all of them."""
        if not len(drafts):
            return
        self._tokens = widen(self._tokens, int((self.length[slots] + counts).max()))
        self._tokens[spread(slots, self.length[slots], counts)] = drafts

    def ids(self, slots: IntArray, begin: Ints, counts: IntArray) -> IntArray:
        """The token ids [T] of `counts` [rows] tokens from `begin` [rows] on of `slots` [rows], draft tokens too."""
        if (counts == 1).all():
            return self._tokens[slots, begin]
        return self._tokens[spread(slots, begin, counts)]

    def chunk(self, slot: int, begin: int, count: int) -> IntArray:
        """The ids of `count` tokens from `begin` on."""
        return self._tokens[slot, begin : begin + count]

    def text(self, slots: Ints, positions: Ints) -> IntArray:
        """The ids at `positions` [rows, n] of `slots` [rows], -1 where a sequence has no token: [rows, n]."""
        slot = slots[:, None]
        inside = (positions >= 0) & (positions < self.length[slot])
        return np.where(inside, self._tokens[slot, np.where(inside, positions, 0)], np.int32(-1))

    def ends_text(self, token: int) -> bool:
        """Whether `token` is one that ends any text."""
        return token in self._eos_ids

    def append(self, slots: IntArray, samples: IntArray, tokens: IntArray) -> list[Ending]:
        """Take in what was sampled for `slots` [rows], `samples` [rows] tokens each: one behind the sequence's last
        token and one behind each of its draft tokens; `tokens` holds all of them. Returns the sequences that end.

        A sample behind a draft token counts if that token is what was sampled in its place. All the others are dropped.
        Where UNDECIDED was sampled, the token before it is computed again, to ask again.
        """
        self.withdraw(slots)
        length = self.length[slots]
        if len(tokens) == len(slots):
            self._tokens = widen(self._tokens, int(length.max()) + 1)
            self._tokens[slots, length] = tokens
            ended = self._ends(slots, tokens[:, None])[:, 0]
            failed = np.minimum(tokens, 0)
            kept = 1 - (failed < 0)  # and they are computed as far as they were: all but the new token, or that too
            again = tokens == UNDECIDED
            self.computed[slots[again]] = length[again] - 1
        else:
            kept, ended, failed = self._verify(slots, samples, tokens)
        undecided = failed == UNDECIDED
        self.undecided[slots[undecided]], failed[undecided] = True, 0
        self.length[slots] = length + kept
        done = ended | (failed < 0) | (self.length[slots] >= self.end[slots])
        checked = self._checked[slots]
        cuts = self._cuts(slots, done, np.flatnonzero(checked)) if checked.any() else {}
        for row, cut in cuts.items():
            self.length[slots[row]] = len(self.request(slots[row]).prompt) + cut.tokens
            done[row], ended[row], failed[row] = True, True, 0
        self.output_tokens += int((self.length[slots] - length).sum())
        return [
            Ending(
                int(slots[row]),
                _reason(int(failed[row]), bool(ended[row])),
                cuts[row].text if row in cuts else None,
            )
            for row in np.flatnonzero(done).tolist()
        ]

    def _cuts(self, slots: IntArray, done: Bools, checked: Ints) -> dict[int, Cut]:
        """The `checked` rows of `slots` [rows] that end at a stop string.

        The thread searches the new tokens of those that are not `done` [rows].
        """
        cuts: dict[int, Cut] = {}
        now: list[int] = []
        later: list[int] = []
        for row, slot in zip(checked.tolist(), slots[checked].tolist(), strict=True):
            search, place = self._searches.pop(slot, (None, 0))
            cut = search.result()[place] if search is not None else None
            if cut is not None:
                cuts[row] = cut
            else:
                (now if done[row] else later).append(row)
        if now:
            found = self._search(slots[now])()
            cuts |= {row: cut for row, cut in zip(now, found, strict=True) if cut is not None}
        if later:
            search = self._thread.submit(self._search(slots[later]))
            self._searches |= {slot: (search, place) for place, slot in enumerate(slots[later].tolist())}
        return cuts

    def _search(self, slots: IntArray) -> Callable[[], list[Cut | None]]:
        """A search for stop strings in the outputs that `slots` [rows] have now, for any thread to run."""
        table, ends = self._tokens, self.length[slots].tolist()  # what is in the table before `ends` stays as it is
        requests = [self.request(slot) for slot in slots.tolist()]

        def search() -> list[Cut | None]:
            rows = zip(slots.tolist(), requests, ends, strict=True)
            return self._find_cuts(requests, [table[slot, len(request.prompt) : end] for slot, request, end in rows])

        return search

    def _ends(self, slots: IntArray, tokens: IntArray) -> Bools:
        """Whether each of `tokens` [rows, n] of `slots` [rows] is one that ends its answer."""
        ends = np.isin(tokens, self._eos_ids) & ~self._ignore_eos[slots, None]
        if self._stop_tokens.shape[1]:
            ends |= (tokens[:, :, None] == self._stop_tokens[slots, None]).any(-1)
        return ends

    def _verify(self, slots: IntArray, samples: IntArray, tokens: IntArray) -> tuple[Ints, Bools, IntArray]:
        """Put what was sampled for `slots` [rows] in place.

        Returns of each row how many count, whether the last of these ends the answer, and NO_TOKEN, DEAD_END or
        UNDECIDED if that follows it, else 0.
        """
        length, width = self.length[slots, None], int(samples.max())
        nth = np.arange(width)
        drawn = tokens[np.minimum((np.cumsum(samples) - samples)[:, None] + nth, len(tokens) - 1)]  # [rows, width]
        self._tokens = widen(self._tokens, int(length.max()) + width)
        right = drawn[:, :-1] == self._tokens[slots[:, None], length + nth[:-1]]
        right &= nth[1:] < samples[:, None]
        kept = np.minimum(1 + np.logical_and.accumulate(right, 1).sum(1), self.end[slots] - length[:, 0])
        counts = nth < kept[:, None]
        none = (drawn < 0) & counts
        last = none | (self._ends(slots, drawn) & counts)
        kept = np.where(last.max(1), last.argmax(1) + 1, kept)
        failed = np.minimum(drawn[np.arange(len(slots)), kept - 1], 0)
        ended = last.max(1) & (failed == 0)
        kept = kept - (failed < 0)
        self._tokens[slots[:, None], length + nth] = drawn
        self.computed[slots] += kept - 1
        return kept, ended, failed


def _reason(failed: int, ended: bool) -> str:
    """Why a sequence ends: `failed` is NO_TOKEN, DEAD_END or 0."""
    if failed:
        return "error" if failed == NO_TOKEN else "dead_end"
    return "stop" if ended else "length"
