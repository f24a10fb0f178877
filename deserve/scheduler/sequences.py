"""The sequences in flight: their tokens, how far they are computed, and when they end."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deserve.batch import NO_TOKEN, IntArray, Ints, Request
from deserve.kvcache.pages import widen
from deserve.scheduler.ids import IdStack

Bools = NDArray[np.bool_]


class Ending(NamedTuple):
    """A sequence that is complete: the OpenAI `finish_reason`, and the text where a stop string cut it.

    The reason is `error` where NO_TOKEN was sampled, `dead_end` where DEAD_END was.
    """

    slot: int
    reason: str
    text: str | None


def never(request: Request, tokens: IntArray) -> str | None:
    """No stop string ends an answer."""
    return None


class Sequences:
    """Sequences in arrays by slot, so that a visit needs no Python loop over them.

    A sequence has `length` tokens, prompt and output, of which the KV cache holds `computed`. If one is missing it
    decodes, if more are it prefills: a new prompt, or a sequence whose pages were taken. Draft tokens stand behind
    `length` while a visit verifies them.
    """

    def __init__(self, slots: int, eos_ids: tuple[int, ...], stopped: Callable[[Request, IntArray], str | None]):
        """`stopped` gives an answer's text up to its first stop string, None where there is none yet."""
        self._eos_ids = np.array(eos_ids, np.int32)
        self._stopped = stopped
        self._free = IdStack(np.arange(slots, dtype=np.int32))
        self._requests: list[Request | None] = [None] * slots
        self._tokens = np.zeros((slots, 64), np.int32)
        self.length, self.computed, self.end, self.age = np.zeros((4, slots), np.int64)
        self.cached = np.zeros(slots, np.int64)  # tokens that others had computed when the sequence was added
        self._checked = np.zeros(slots, bool)  # has stop strings or tokens
        self._ignore_eos = np.zeros(slots, bool)
        self._added = 0

    @property
    def in_flight(self) -> int:
        """Sequences that have been added and not removed."""
        return len(self._requests) - len(self._free)

    @property
    def free(self) -> int:
        """Slots for further sequences."""
        return len(self._free)

    def request(self, slot: int) -> Request:
        """What the sequence in `slot` answers."""
        request = self._requests[slot]
        assert request is not None
        return request

    def output(self, slot: int) -> IntArray:
        """The answer so far."""
        return self._tokens[slot, len(self.request(slot).prompt) : self.length[slot]]

    def add(self, request: Request, cached: int = 0) -> int:
        """Give `request` a slot, of which one must be free; of its tokens the first `cached` are computed."""
        slot = int(self._free.take(1)[0])
        length = len(request.prompt)
        self._requests[slot] = request
        self._tokens = widen(self._tokens, length + 1)
        self._tokens[slot, :length] = request.prompt
        self.length[slot], self.computed[slot], self.cached[slot] = length, cached, cached
        self.end[slot] = length + request.sampling.max_tokens
        self.age[slot], self._added = self._added, self._added + 1
        self._checked[slot] = bool(request.sampling.stop or request.sampling.stop_token_ids)
        self._ignore_eos[slot] = request.sampling.ignore_eos
        return slot

    def remove(self, slot: int) -> None:
        """Free `slot`."""
        self._requests[slot] = None
        self._free.give(np.array([slot], np.int32))

    def missing(self, slots: Ints) -> Ints:
        """Tokens of `slots` [rows] that the KV cache does not hold: [rows]."""
        return self.length[slots] - self.computed[slots]

    def propose(self, slots: IntArray, counts: IntArray, drafts: IntArray) -> None:
        """Put `counts` [rows] draft tokens behind the sequences of `slots` [rows]; `drafts` holds all of them."""
        if not len(drafts):
            return
        self._tokens = widen(self._tokens, int((self.length[slots] + counts).max()))
        self._tokens[_spread(slots, self.length[slots], counts)] = drafts

    def ids(self, slots: IntArray, begin: Ints, counts: IntArray) -> IntArray:
        """The token ids [T] of `counts` [rows] tokens from `begin` [rows] on of `slots` [rows], draft tokens too."""
        if int(counts.sum()) == len(slots):  # one of each
            return self._tokens[slots, begin]
        return self._tokens[_spread(slots, begin, counts)]

    def chunk(self, slot: int, begin: int, count: int) -> IntArray:
        """The ids of `count` tokens from `begin` on."""
        return self._tokens[slot, begin : begin + count]

    def append(self, slots: IntArray, samples: IntArray, tokens: IntArray) -> list[Ending]:
        """Take in what was sampled for `slots` [rows], `samples` [rows] tokens each: one behind the sequence's last
        token and one behind each of its draft tokens; `tokens` holds all of them. Returns the sequences that end.

        A sample behind a draft token counts if that token is what was sampled in its place. All the others are dropped.
        """
        length = self.length[slots]
        if len(tokens) == len(slots):
            self._tokens = widen(self._tokens, int(length.max()) + 1)
            self._tokens[slots, length] = tokens
            ended = np.isin(tokens, self._eos_ids) & ~self._ignore_eos[slots]
            failed = np.minimum(tokens, 0)
            kept = 1 - (failed < 0)  # and they are computed as far as they were: all but the new token
        else:
            kept, ended, failed = self._verify(slots, samples, tokens)
        texts: dict[int, str] = {}
        for row in np.flatnonzero(self._checked[slots]).tolist():
            for count in range(1, int(kept[row]) + 1):
                self.length[slots[row]] = length[row] + count
                text = self._stopped(self.request(slots[row]), self.output(slots[row]))
                if text is not None:
                    texts[row], kept[row] = text, count
                    ended[row], failed[row] = True, 0
                    break
        length = length + kept
        self.length[slots] = length
        done = ended | (failed < 0) | (length >= self.end[slots])
        return [
            Ending(int(slots[row]), _reason(int(failed[row]), bool(ended[row])), texts.get(row))
            for row in np.flatnonzero(done).tolist()
        ]

    def _verify(self, slots: IntArray, samples: IntArray, tokens: IntArray) -> tuple[Ints, Bools, IntArray]:
        """Put what was sampled for `slots` [rows] in place.

        Returns of each row how many count, whether the last of these ends the answer, and NO_TOKEN or DEAD_END if that
        follows it, else 0.
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
        last = none | (np.isin(drawn, self._eos_ids) & ~self._ignore_eos[slots, None] & counts)
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


def _spread(slots: Ints, begin: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Slot and position of each of `counts` [rows] tokens from `begin` [rows] on."""
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(slots, counts), np.repeat(begin, counts) + nth
