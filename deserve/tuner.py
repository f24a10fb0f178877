"""Tunes how visits are filled while a job runs: a hill-climb on the throughput that is measured.

A change shows only after the sequences in flight have made way for others: those that began together end together, and
visits of prompts alternate with visits of answers. So throughput is measured over whole waves of sequences, after a
wave that does not count, and by the requests' worth of work done, prompts and answers alike.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

STEPS = (0.75, 1.33)  # in which tokens and rows are changed
MARGIN = 0.03  # what a change must bring more, twice; less may be chance
WAVES_LEFT = 20  # of the job, that a trial is worth: it takes two to four, and a wave more to go back
LOSS = 0.02  # of the job's time, that trials may cost before there are no more
PATIENCE = 1.5  # times the usual duration of a wave, after which a trial is given up
FEWEST = 16  # requests of a wave
HOPELESS = -1.0  # in place of the rate of a wave that was not awaited


@dataclass(frozen=True)
class Filling:
    """How visits are filled. Rank 0 may change it between two visits."""

    policy: str
    tokens: int  # of a visit, at most
    rows: int  # sequences of a micro-batch, at most


@dataclass
class _Wave:
    """What has been done since `begin` (s), until `size` requests are finished."""

    begin: float
    size: int
    prompts: int = 0
    samples: int = 0
    finished: int = 0


_Trials = Generator[Filling, float, None]  # fillings to take a wave through; gets its requests' worth a second


class Tuner:
    """Tries fillings around `filling`, none with more tokens or rows than `most`, and keeps what is faster.

    `knobs` names the fields of a filling that may change. `requests` are still to be answered, None: nobody knows.
    """

    def __init__(
        self, filling: Filling, most: Filling, knobs: tuple[str, ...], policies: tuple[str, ...], requests: int | None
    ):
        self.filling = self._best = self._began = filling
        self._most, self._knobs, self._policies, self._requests = most, knobs, policies, requests
        self._prompts = self._answers = self._finished = 0  # tokens of finished requests, and their number
        self._wave: _Wave | None = None
        self._usual_s = float("inf")  # of a wave
        self._elapsed_s = self._lost_s = 0.0
        self._settling = 0  # waves to come in which sequences of a trial are still in flight
        self._moves: list[dict[str, Any]] = []
        self._tried = 0
        self._trials: _Trials | None = self._climb() if knobs else None
        if self._trials is not None:
            next(self._trials)

    def visited(
        self, now: float, in_flight: int, prompts: int, samples: int, finished: Sequence[tuple[int, int]]
    ) -> bool:
        """A visit has come back at `now` (s); returns whether `filling` changed.

        `prompts` and `samples`: its tokens. `in_flight`: sequences. `finished`: prompt and answer tokens of the
        requests that it completed.
        """
        for prompt, answer in finished:
            self._prompts, self._answers = self._prompts + prompt, self._answers + answer
        self._finished += len(finished)
        if self._trials is None:
            return False
        wave = self._wave
        if wave is None:
            self._wave = _Wave(now, max(FEWEST, in_flight))
            return False
        wave.prompts, wave.samples = wave.prompts + prompts, wave.samples + samples
        wave.finished += len(finished)
        took = now - wave.begin
        whole = wave.finished >= wave.size
        if not whole and (self.filling == self._best or took < PATIENCE * self._usual_s):
            return False
        self._wave = _Wave(now, max(FEWEST, in_flight))
        self._elapsed_s += took
        if self.filling != self._best or self._settling:
            self._lost_s += max(0.0, took - self._usual_s)
        else:
            self._usual_s = took
        # Half for the prompts and half for the answers, each by what a request has on average.
        worth = (wave.prompts / max(1, self._prompts) + wave.samples / max(1, self._answers)) / 2 * self._finished
        before = self.filling
        # What was begun in a wave is in flight in the next; of one that was given up, the rest is a wave of its own.
        self._settling = max(0, self._settling - 1) if before == self._best else 1 if whole else 2
        try:
            self.filling = self._trials.send(worth / max(took, 1e-9) if whole else HOPELESS)
        except StopIteration:
            self._trials, self.filling = None, self._best
        return self.filling != before

    def report(self) -> dict[str, Any]:
        """What became of the filling, for metrics.json."""
        return {"began": asdict(self._began), "ended": asdict(self._best), "tried": self._tried, "moves": self._moves}

    def _climb(self) -> _Trials:
        rate = yield from self._rate(self._best)
        while self._requests is None and not self._worth_a_trial():
            rate = yield self._best  # until it has become a long job
        improved = True
        while improved:
            improved = False
            for filling in list(self._neighbours()):
                if not self._worth_a_trial():
                    return
                self._tried += 1
                found = yield from self._rate(filling)
                rate, before = (yield from self._rate(self._best)), rate
                if found <= (1 + MARGIN) * max(rate, before):
                    continue
                again = yield from self._rate(filling)
                if again <= (1 + MARGIN) * max(rate, before):
                    continue
                gain = min(found, again) / max(rate, before) - 1
                self._moves.append({**asdict(filling), "gain": round(gain, 3), "after_requests": self._finished})
                self._best, rate, improved = filling, min(found, again), True
                break

    def _rate(self, filling: Filling) -> Generator[Filling, float, float]:
        """Requests' worth a second under `filling`, once it has taken hold."""
        if (yield filling) == HOPELESS:
            return HOPELESS
        return (yield filling)

    def _worth_a_trial(self) -> bool:
        """Whether enough of the job is left; of one that nobody knows, as much as there has been."""
        assert self._wave is not None
        left = self._finished if self._requests is None else self._requests - self._finished
        waves = left / self._wave.size
        return waves >= WAVES_LEFT and self._lost_s <= LOSS * (self._elapsed_s + waves * self._usual_s)

    def _neighbours(self) -> Iterator[Filling]:
        """Fillings that differ from the best in one thing, first in what has helped before."""
        best = self._best
        near = []
        for knob in sorted({"tokens", "rows"} & set(self._knobs)):
            now, most = getattr(best, knob), getattr(self._most, knob)
            near += [replace(best, **{knob: max(1, min(most, round(step * now)))}) for step in STEPS]
        if "policy" in self._knobs:
            near += [replace(best, policy=policy) for policy in self._policies]
        return (filling for filling in dict.fromkeys(near) if filling != best and filling.rows <= filling.tokens)
