"""Draft tokens: what a grammar forces, and what followed the same tokens before, in a sequence's own text or in other
answers.

A visit verifies them beside the token that a sequence is due (`Sequences.append`), so a right one saves a trip round
the ring. After prompt lookup and SuffixDecoding (arXiv 2411.04975).
"""

from collections import Counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deserve.batch import IntArray, Ints
from deserve.scheduler.forced import Forced
from deserve.scheduler.sequences import Sequences

ORDERS = (8, 4, 2)  # tokens by which an earlier place is looked up
COMPARED = 16  # tokens that the two places are compared by at most: the longer the match, the better the drafts
MOST = 16  # draft tokens of a row
ENTRIES = 1 << 21  # of each lookup table, 16 MB
TEXT = 1 << 22  # tokens of finished answers that are kept, 16 MB: the last ones
LEAD = 8  # of these, tokens of its prompt before each answer, by which its beginning is found
OWN, ANSWERS, FORCED, MODEL = range(4)  # the own text, any answer of this job, the sequence's grammar, a draft model
SOURCES = {
    "own_text": "a sequence's own text",
    "answers": "other answers",
    "grammar": "a grammar",
    "model": "the draft model",
}
HOPE = 0.8  # of a draft model, before there are trials
PRIOR = 8.0  # trials that the guess at how often a match goes on stands for, until there are real ones
MEMORY = 4096.0  # trials after which older ones count half
FORGETS = 0.3  # a row's luck: what its last drafts weigh
LUCK = 1.0  # right drafts that a row's luck begins with, where as many were expected
SURE = 0.99  # no draft is likelier
GAIN = 1.1  # predicted of drafts, or there are none: the prediction is not better, and leaves out rank 0's own time


class CycleTime(Protocol):
    """Seconds between two visits of a round."""

    def __call__(
        self, rounds: int, sequences: int, prompts: int = 0, drafts: int = 0, drafting_s: float = 0.0
    ) -> float:
        """Where so many rounds share so many sequences, and each visit has so many prompt and draft tokens besides.

        A draft model takes `drafting_s` of rank 0 for each.
        """


class Model(Protocol):
    """A draft model."""

    def seconds(self, rows: int, steps: int) -> float:
        """What `steps` drafts for each of `rows` sequences take."""

    def draft(self, sequences: Sequences, slots: IntArray, steps: int) -> IntArray:
        """The likeliest next `steps` tokens of each of `slots` [rows], -1 where there is none: [rows, steps]."""

    def forget(self, slot: int) -> None:
        """The sequence in `slot` is complete."""


class Drafts:
    """Puts draft tokens behind sequences: `fixed` of them, or as many as bring more than they cost by `cycle_s`.

    How likely a draft is, by where it comes from and how long a match precedes it, is learned from all that were found,
    whether or not a visit verified them: the texts show later what they were worth. A `bucket` stands for both.
    """

    def __init__(
        self,
        slots: int,
        cycle_s: CycleTime | None = None,
        fixed: int | None = None,
        forced: Forced | None = None,
        model: Model | None = None,
    ):
        assert cycle_s is not None or fixed is not None
        self._cycle_s, self._fixed, self._forced, self._model = cycle_s, fixed, forced, model
        self.most = MOST if fixed is None else fixed  # draft tokens of a row
        self._store = slots  # the finished answers stand for one more slot
        self._text = np.full(TEXT, -1, np.int32)
        self._text_end = self._text_indexed = 1
        # Slot and position of the token behind n tokens, by their hash: [source][order].
        self._tables = [[np.full(ENTRIES, -1, np.int64) for _ in ORDERS] for _ in (OWN, ANSWERS)]
        self._owner = np.full(slots, -1, np.int64)  # age of the sequence that `_indexed` is about
        self._indexed = np.zeros(slots, np.int64)  # tokens of it that the tables know what follows
        # The last proposals: the length before them, how many a visit verifies, and all that were found.
        self._length, self._verified = np.zeros((2, slots), np.int64)
        self._found = np.full((slots, self.most), -1, np.int32)
        self._bucket = np.zeros((slots, self.most), np.int64)
        self._luck = np.full((2, slots), LUCK)  # right drafts of each row of late, and how many were expected
        self._tried, self._right = np.zeros((2, len(SOURCES) * (COMPARED + 1)))
        self._tried += PRIOR
        self._right += PRIOR * np.tile(np.linspace(0.2, 0.95, COMPARED + 1), len(SOURCES))
        self._right[_bucket(MODEL, 0) :] = PRIOR * HOPE
        self._counts: Counter[str] = Counter()

    def report(self) -> dict[str, Any]:
        """What became of the drafts, for metrics.json."""
        count = self._counts
        by_source = {name: {"drafted": count[name], "right": count[f"{name} right"]} for name in SOURCES if count[name]}
        right = sum(source["right"] for source in by_source.values())
        drafted = sum(source["drafted"] for source in by_source.values())
        return {
            "drafted": drafted,
            "right": right,
            "by_source": by_source,
            "tokens_per_trip": (count["rows"] + right) / max(1, count["rows"]),
        }

    def propose(
        self,
        sequences: Sequences,
        slots: IntArray,
        most: Ints,
        room: int,
        rounds: int,
        prompts: int,
        tail: bool = False,
    ) -> Ints:
        """Put up to `most` [rows] draft tokens behind the sequences of `slots` [rows], `room` in all; returns how many:
        [rows].

        `rounds` are open, and visits hold `prompts` prompt tokens. In a job's `tail` nobody waits for a place.
        """
        self._counts["rows"] += len(slots)
        self._settle(sequences, slots)
        most = np.clip(most, 0, self.most)
        room = min(room, int(most.sum()))
        certain, load = np.ones(room), (rounds, sequences.in_flight, prompts)
        if not room or not self._allowed(len(slots), certain, *load):
            return np.zeros(len(slots), np.int64)
        self._index(sequences, slots)
        found, bucket = self._find(sequences, slots)
        chances = self._chances(slots, found, bucket)
        drafting_s = 0.0
        if self._model is not None:
            rate = self._model_rate()
            rows = np.flatnonzero((chances[:, 0] < rate[0]) & (most > 0))
            steps = self._steps(self._model, len(slots), len(rows), min(room, int(most[rows].max(initial=0))), *load)
            if steps:
                drafting_s = self._model.seconds(len(rows), steps)
                found[rows, steps:], bucket[rows] = -1, _bucket(MODEL, np.minimum(np.arange(self.most), COMPARED))
                found[rows, :steps] = self._model.draft(sequences, slots[rows], steps)
                if self._forced is not None:
                    self._forced.cut(sequences, slots, found)
                chances = self._chances(slots, found, bucket)
        possible = np.where(np.arange(self.most) < most[:, None], chances, 0.0)
        # The likeliest of all rows' drafts; none is likelier than the one before it in its row.
        order = np.argsort(-possible, axis=None, kind="stable")[: min(room, int(np.count_nonzero(possible)))]
        of_row = order // self.most
        allowed = self._allowed(len(slots), possible.flat[order], *load, drafting_s, of_row if tail else None)
        counts = np.bincount(of_row[:allowed], minlength=len(slots))
        sequences.propose(slots, counts.astype(np.int32), found[np.arange(self.most) < counts[:, None]])
        self._length[slots], self._verified[slots] = sequences.length[slots], counts
        self._found[slots], self._bucket[slots] = found, bucket
        return counts

    def passed(self, rows: int) -> None:
        """A visit has so many rows and was planned ahead: it is not known what their drafts would follow."""
        self._counts["rows"] += rows

    def ends(self, sequences: Sequences, slot: int) -> None:
        """The sequence in `slot` is complete: its answer is kept for others."""
        self._settle(sequences, np.array([slot]))
        if self._forced is not None:
            self._forced.forget(slot)
        if self._model is not None:
            self._model.forget(slot)
        answer = sequences.output(slot)
        while len(answer) and sequences.ends_text(int(answer[-1])):
            answer = answer[:-1]
        lead = sequences.request(slot).prompt[-LEAD:]
        text = np.concatenate([lead, answer, [-1]]).astype(np.int32)
        if len(text) >= TEXT:
            return
        if self._text_end + len(text) > TEXT:
            self._index_answers()
            self._text[self._text_end :] = -1
            self._text_end = self._text_indexed = 1
        self._text[self._text_end : self._text_end + len(text)] = text
        self._text_end += len(text)

    # -- what drafts are worth

    def _allowed(
        self,
        rows: int,
        chances: NDArray[Any],
        rounds: int,
        sequences: int,
        prompts: int,
        drafting_s: float = 0.0,
        of_row: Ints | None = None,
    ) -> int:
        """How many of a visit's drafts are worth it beside its `rows`; `chances` [n] fall from one to the next.

        Making them took `drafting_s`, whether they are verified or not. In a job's tail it is told whose they are,
        `of_row` [n]: the last to end sets the time, so what counts is how long a row waits for a token in the mean.
        """
        most = len(chances)
        if self._fixed is not None or not most:
            return most
        assert self._cycle_s is not None
        gains = np.cumsum(chances)
        best, count = GAIN * rows / self._cycle_s(rounds, sequences, prompts, 0, drafting_s), 0
        for some in sorted({max(1, most * eighth // 8) for eighth in range(1, 9)}):
            tokens = rows + gains[some - 1]
            if of_row is not None:
                tokens = rows**2 / (1 / (1 + np.bincount(of_row[:some], chances[:some], rows))).sum()
            rate = tokens / self._cycle_s(rounds, sequences, prompts, some, drafting_s)
            if rate > best:
                best, count = rate, some
        return count

    def _model_rate(self) -> NDArray[np.float64]:
        """How likely each draft of the model's is right behind right ones: [most]."""
        nth = _bucket(MODEL, np.minimum(np.arange(self.most), COMPARED))
        return np.minimum(self._right[nth] / self._tried[nth], SURE)

    def _steps(
        self, model: Model, rows: int, drafted: int, most: int, rounds: int, sequences: int, prompts: int
    ) -> int:
        """How many drafts, of `most`, the model is to make for `drafted` of a visit's `rows`."""
        if self._fixed is not None or not drafted or not most:
            return most if drafted else 0
        assert self._cycle_s is not None
        gains = drafted * self._model_rate().cumprod().cumsum()
        best, count = GAIN * rows / self._cycle_s(rounds, sequences, prompts), 0
        for steps in range(1, most + 1):
            cycle_s = self._cycle_s(rounds, sequences, prompts, drafted * steps, model.seconds(drafted, steps))
            if (rows + gains[steps - 1]) / cycle_s > best:
                best, count = (rows + gains[steps - 1]) / cycle_s, steps
        return count

    def _chances(self, slots: IntArray, found: IntArray, bucket: Ints) -> NDArray[np.float64]:
        """How likely all drafts up to each of `found` [rows, most] are right: [rows, most], 0 where there is none."""
        rate = self._right[bucket] / self._tried[bucket]
        luck = (self._luck[0, slots] + LUCK) / (self._luck[1, slots] + LUCK)
        chances: NDArray[np.float64] = np.where(found >= 0, np.minimum(rate * luck[:, None], SURE), 0.0).cumprod(1)
        return chances

    def _settle(self, sequences: Sequences, slots: Ints) -> None:
        """Learn which drafts that were last found for `slots` [rows] were right, and forget them."""
        length, found, bucket = self._length[slots, None], self._found[slots], self._bucket[slots]
        self._found[slots] = -1
        came = sequences.text(slots, length + np.arange(self.most))  # -1 beyond the end
        right = ((found == came) & (found >= 0)).cumprod(1)
        before = np.pad(right, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
        tried = (before > 0) & (found >= 0) & (came >= 0)
        rate = self._right[bucket] / self._tried[bucket]
        self._luck[:, slots] *= 1 - FORGETS * tried[:, 0]
        self._luck[:, slots] += np.stack([right.sum(1), (rate * tried).sum(1)])
        np.add.at(self._tried, bucket[tried], 1.0)
        np.add.at(self._right, bucket[tried], right[tried])
        old = self._tried > MEMORY
        self._tried[old] /= 2
        self._right[old] /= 2
        verified = (np.arange(self.most) < self._verified[slots, None]) & (came[:, :1] >= 0)
        self._verified[slots] = 0
        for nth_source, name in enumerate(SOURCES):
            of_it = verified & (bucket // (COMPARED + 1) == nth_source)
            self._counts[name] += int(of_it.sum())
            self._counts[f"{name} right"] += int(right[of_it].sum())

    def _find(self, sequences: Sequences, slots: IntArray) -> tuple[IntArray, Ints]:
        """What may follow in each of `slots` [rows], -1 from where nothing is found on, and the bucket of each such
        token: [rows, most].

        First comes what a grammar forces, then what followed the text with that. A grammar also ends drafts.
        """
        nth = np.arange(self.most)
        last = sequences.text(slots, sequences.length[slots, None] + np.arange(-COMPARED, 0))
        if self._forced is None:
            forced = np.full((len(slots), self.most), -1, np.int32)
        else:
            forced = self._forced.tokens(sequences, slots, self.most)
        begin = np.count_nonzero(forced >= 0, 1)[:, None]
        known = np.hstack([last, forced])
        source, match, at = self._lookup(sequences, slots, np.take_along_axis(known, begin + np.arange(COMPARED), 1))
        behind = np.where(at[:, None] >= 0, self._read(sequences, at, np.arange(self.most)), -1)
        found = np.where(nth < begin, forced, np.take_along_axis(behind, np.maximum(nth - begin, 0), 1))
        found = np.where((found >= 0).cumprod(1), found, np.int32(-1))
        # At the start of an answer a match says little: all prompts end with the same tokens of a chat template.
        answered = (sequences.length[slots] - sequences.prompt_length[slots])[:, None] + begin
        evidence = np.minimum(match[:, None], answered) + np.maximum(nth - begin, 0)
        length = np.where(nth < begin, COMPARED, np.minimum(evidence, COMPARED))
        bucket = _bucket(np.where(nth < begin, FORCED, source[:, None]), length)
        if self._forced is not None:
            self._forced.cut(sequences, slots, found)
        return found, bucket

    # -- the texts

    def _index(self, sequences: Sequences, slots: IntArray) -> None:
        """Let the tables know what follows what in the texts of `slots` [rows] and in finished answers."""
        self._index_answers()
        new = self._owner[slots] != sequences.age[slots]
        self._owner[slots[new]] = sequences.age[slots[new]]
        self._indexed[slots[new]], self._luck[:, slots[new]] = 0, LUCK
        begin = self._indexed[slots]
        counts = sequences.length[slots] - begin - 1  # of the last token it is not known what follows
        self._indexed[slots] += counts
        row = np.repeat(np.arange(len(slots)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        slot, behind = slots[row].astype(np.int64), begin[row] + nth + 1
        entry = (slot << 32) | behind
        answers = behind >= sequences.prompt_length[slot]
        for order, n in enumerate(ORDERS):
            long = behind >= n
            keys = _hashes(sequences.text(slot[long], behind[long, None] + np.arange(-n, 0)))
            self._tables[OWN][order][_place(keys, sequences.age[slot[long]])] = entry[long]
            of_answers = answers[long]
            self._tables[ANSWERS][order][_place(keys[of_answers])] = entry[long][of_answers]

    def _index_answers(self) -> None:
        begin, end = self._text_indexed, self._text_end
        for order, n in enumerate(ORDERS):
            text = self._text[max(0, begin - n) : end]
            if len(text) > n:
                windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
                behind = max(0, begin - n) + n + np.arange(len(windows))
                known = (windows >= 0).all(1)
                entry = (np.int64(self._store) << 32) | behind[known]
                self._tables[ANSWERS][order][_place(_hashes(windows[known]))] = entry
        self._text_indexed = end

    def _lookup(self, sequences: Sequences, slots: IntArray, last: IntArray) -> tuple[Ints, Ints, Ints]:
        """Where each of `slots` [rows] goes on after its `last` [rows, COMPARED] tokens: the source, the tokens that
        match before it, and the place; all [rows].

        The place is -1 where the last tokens are new. Of several the longest match is taken, of equal ones the
        sequence's own.
        """
        source, match = np.zeros((2, len(slots)), np.int64)
        at = np.full(len(slots), -1, np.int64)
        for order, n in enumerate(ORDERS):
            keys = _hashes(last[:, -n:])
            for where, salt in ((OWN, sequences.age[slots]), (ANSWERS, None)):
                entry = self._tables[where][order][_place(keys, salt)]
                same = (self._read(sequences, entry, np.arange(-COMPARED, 0)) == last) & (last >= 0)
                alike = same[:, ::-1].cumprod(1).sum(1)
                better = (entry >= 0) & (alike >= n) & (alike > match)
                source[better], match[better], at[better] = where, alike[better], entry[better]
        return source, match, at

    def _read(self, sequences: Sequences, entry: Ints, offsets: Ints) -> IntArray:
        """The tokens at `offsets` [n] from each of the places `entry` [rows], -1 beyond a text: [rows, n]."""
        slot, position = entry >> 32, (entry & 0xFFFFFFFF)[:, None] + offsets
        stored = self._text[np.clip(position, 0, TEXT - 1)]
        held = slot < self._store
        flying = sequences.text(np.where(held, slot, 0), position)
        return np.where(held[:, None], flying, stored)


def _bucket(source: Any, length: Any) -> Any:
    """That of drafts from `source` after so many tokens that match; of a model's, after so many of its drafts."""
    return source * (COMPARED + 1) + length


def _hashes(windows: IntArray) -> NDArray[np.uint64]:
    """A number for each of `windows` [m, n] of tokens: [m]."""
    n = windows.shape[1]
    with np.errstate(over="ignore"):
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, n + 1, dtype=np.uint64)
        return np.asarray((windows.astype(np.uint64) * powers).sum(1, dtype=np.uint64))


def _place(keys: NDArray[np.uint64], salt: Ints | None = None) -> Ints:
    """Where in a table the `keys` [m] lie, those of a `salt` [m] apart from all others."""
    with np.errstate(over="ignore"):
        if salt is not None:
            keys = keys + (salt.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        keys = (keys ^ (keys >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((keys >> np.uint64(32)) & np.uint64(ENTRIES - 1)).astype(np.int64)
