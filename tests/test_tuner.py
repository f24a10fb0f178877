"""Tuning while a job runs, on simulated machines: it finds what is faster, and never costs more than noise."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deserve.batch import VisitResult
from deserve.layout import Layout
from deserve.planner.simulator import Requests
from deserve.report.summary import tuning
from deserve.scheduler.scheduler import Scheduler
from deserve.tuner import FEWEST, Filling, Tuner

START, MOST = Filling("prefill_first", 256, 64), Filling("prefill_first", 512, 64)
POLICIES = ("prefill_first", "decode_first")
KNOBS = ("policy", "tokens", "rows")
PROMPT, ANSWER = 100, 50


class Machine:
    """Answers requests in phases, prompts first, then answers; a request takes `cost(filling)` seconds, more or less.

    What a change of the filling does takes hold after the sequences in flight have been answered.
    """

    def __init__(self, cost: dict[Filling, float], otherwise: float, noise: float, seed: int):
        self._cost, self._otherwise, self._noise = cost, otherwise, noise
        self._random = np.random.default_rng(seed)

    def run(self, tuner: Tuner, requests: int) -> float:
        """Seconds of a job."""
        now, held = 0.0, tuner.filling
        for _ in range(requests // 64):
            wave_s = 64 * self._cost.get(held, self._otherwise) * (1 + self._noise * self._random.uniform(-1, 1))
            held = tuner.filling
            for phase in range(20):  # the first four are prompts, and take a fifth of the time
                now += wave_s * 0.05
                prompts, samples = (16 * PROMPT, 0) if phase < 4 else (0, 4 * ANSWER)
                tuner.visited(now, 64, prompts, samples, [(PROMPT, ANSWER)] * 64 if phase == 19 else [])
        return now


def tuner(knobs: tuple[str, ...] = KNOBS, requests: int | None = 64 * 400) -> Tuner:
    return Tuner(START, MOST, knobs, POLICIES, requests)


def test_a_faster_filling_is_found_step_by_step() -> None:
    cost = {START: 1.0, Filling("prefill_first", 340, 64): 0.9, Filling("prefill_first", 452, 64): 0.8}
    cost |= {Filling("decode_first", 452, 64): 0.7}
    made = tuner()
    took = Machine(cost, 1.2, 0.01, 0).run(made, 64 * 400)
    assert made.filling == Filling("decode_first", 452, 64)
    assert took < 0.8 * 64 * 400
    report = made.report()
    assert report["began"]["tokens"] == 256 and report["ended"]["policy"] == "decode_first"
    assert len(report["moves"]) == 3 and report["tried"] > 3


@settings(max_examples=60)
@example(worse=1.5, noise=0.0, seed=0, waves=31, known=False)  # was taken for the usual time of a wave
@example(worse=2.0, noise=0.0, seed=0, waves=34, known=True)  # given up, and in flight still
@given(
    worse=st.floats(1.0, 2.0),
    noise=st.floats(0, 0.05),
    seed=st.integers(0, 1000),
    waves=st.integers(2, 300),
    known=st.booleans(),
)
def test_tuning_costs_no_more_than_noise(worse: float, noise: float, seed: int, waves: int, known: bool) -> None:
    """Where every other filling is slower, however much, and whether or not the job's size is known."""
    plain, tuned = (tuner(knobs, 64 * waves if known else None) for knobs in ((), KNOBS))
    machine = Machine({START: 1.0}, worse, noise, seed)
    took = machine.run(tuned, 64 * waves)
    assert tuned.report()["ended"] == tuned.report()["began"] or worse < 1 + 4 * noise
    assert not plain.visited(0.0, 64, 1, 1, [])
    untuned = Machine({START: 1.0}, worse, noise, seed).run(plain, 64 * waves)
    # Of a job of unknown size twice the loss; and one trial at its worst: two waves, and what is in flight then.
    assert took <= untuned * (1.04 + noise) + 64 * 3 * (worse - 1)


@pytest.mark.parametrize("knob", KNOBS)
def test_what_is_set_by_hand_is_never_changed(knob: str) -> None:
    made = tuner(tuple(other for other in KNOBS if other != knob))
    seen = set()
    for wave in range(200):
        for _ in range(2):
            made.visited(wave, 64, 1, 1, [(1, 1)] * 64)
        seen.add(getattr(made.filling, knob))
    assert seen == {getattr(START, knob)}


def test_buffers_are_large_enough_for_all_that_is_tried() -> None:
    made, fillings = tuner(), set()
    for wave in range(300):
        made.visited(float(wave), 64, 10, 10, [(1, 1)] * 64)
        fillings.add(made.filling)
    assert len(fillings) > 4
    assert all(filling.tokens <= MOST.tokens and filling.rows <= MOST.rows for filling in fillings)


def test_a_short_job_stays_as_it_was_planned() -> None:
    made = tuner(requests=64 * 10)
    Machine({}, 1.0, 0.0, 0).run(made, 64 * 10)
    assert made.report()["tried"] == 0 and made.filling == START and FEWEST <= 64


def test_the_closing_lines_say_what_tuning_did() -> None:
    made = tuner()
    assert tuning(made.report()) == []
    Machine({START: 1.0}, 1.5, 0.0, 0).run(made, 64 * 200)
    (line,) = tuning(made.report())
    assert "none was faster" in line
    faster = tuner()
    Machine({START: 1.0, Filling("decode_first", 256, 64): 0.8}, 1.1, 0.0, 0).run(faster, 64 * 200)
    (line,) = tuning(faster.report())
    assert "policy prefill_first -> decode_first" in line and "(+25 %)" in line


def test_a_scheduler_fills_visits_as_it_is_told() -> None:
    layout = Layout((0,), 1, 8, 8, 16, "prefill_first", 16, 100, 0, 0)
    scheduler = Scheduler(layout, Requests([(16, 8)] * 20))
    scheduler.fill_by("decode_first", 4, 2)
    tokens, rows = set(), set()
    for _ in range(60):
        scheduler.commit(0, VisitResult(np.zeros(scheduler.awaited(0), np.int32)))
        visit, _ = scheduler.plan(0)
        tokens.add(visit.tokens)
        rows.add(len(scheduler.micro_batches[0].slots))
    assert max(tokens) == 4 and max(rows) == 2
