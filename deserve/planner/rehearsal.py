"""A rehearsal: the loop of a run, for what a visit costs a rank beside its stage.

Frames, the threads that carry them, Python and scheduling take their time on cores and in caches that stages compute
in at that moment, on this rank and on others of the same host. So they are timed where they happen, in the loop itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch

from deserve.batch import IntArray, Request, SamplingParams, VisitPlan, VisitResult
from deserve.comm.link import Receiver
from deserve.comm.ring import connect
from deserve.comm.world import World
from deserve.config import Config
from deserve.pipeline import run_pipeline
from deserve.planner.plan import Plan
from deserve.planner.times import Curve
from deserve.report.timeline import Timeline
from deserve.scheduler.scheduler import Scheduler
from deserve.stage import Stage

AHEAD = 2  # rounds more than ranks, so that nobody waits for the slowest rank's frames
TAKES = 2  # of every scene, in turn: the better one counts, as something else may disturb the other
LONGEST_S = 0.2  # of a take
MOST_VISITS = 40
FEWEST_VISITS = 4

Forward: TypeAlias = Callable[[VisitPlan, torch.Tensor], torch.Tensor]  # hidden states [T, hidden] through some layers


@dataclass(frozen=True)
class Scene:
    """A visit to rehearse: the plan, the hidden states [T, hidden], and the seconds that they take the stage alone."""

    plan: VisitPlan
    hidden: torch.Tensor
    alone_s: float


class Alike:
    """A source of requests that are all alike and never end."""

    exhausted = False

    def __init__(self, prompt: int, answer: int):
        self._request = Request("", np.zeros(prompt, np.int32), SamplingParams(max_tokens=answer))

    def poll(self) -> Request:
        return self._request


@dataclass(frozen=True)
class Rehearsed:
    """What a visit in the loop takes beyond its stage alone, by its tokens: `planning` on rank 0, and the `rest`.

    `slowdown`: how many times as long as alone the stage itself takes there.
    """

    planning: Curve
    rest: Curve
    slowdown: float


class _Take(NamedTuple):
    """Seconds of a visit in the loop: planning, computing, waiting for frames, and from one visit to the next."""

    planning: float
    computing: float
    waiting: float
    apart: float

    @property
    def rest(self) -> float:
        return self.apart - self.planning - self.computing - self.waiting


def rehearse(world: World, config: Config, forward: Forward, scenes: list[Scene], latency_s: float) -> Rehearsed:
    """The loop on CPUs. Every rank calls it. The links have `latency_s` one way."""
    filling = [int(min(64.0, world.size * latency_s / max(scene.alone_s, 1e-4))) for scene in scenes]
    # Rank 0's view counts: all ranks must take part in the same number of rounds.
    rounds = world.share("rehearsal/rounds", [world.size + AHEAD + more for more in filling])
    device = torch.device("cpu")
    takes = [
        [
            _take(world, config, forward, scene, number, _visits(scene.alone_s), device)
            for scene, number in zip(scenes, rounds, strict=True)
        ]
        for _ in range(TAKES)
    ]
    best = [min(of_scene, key=lambda take: take.apart - take.waiting) for of_scene in zip(*takes, strict=True)]
    planning, computing, beside = zip(*((take.planning, take.computing, take.rest) for take in best), strict=True)
    # What all visits have in common grows with them; what short ones have on top comes once a visit.
    slowdown = max(1.0, min(took / scene.alone_s for took, scene in zip(computing, scenes, strict=True)))
    rest = [
        extra + max(0.0, took - slowdown * scene.alone_s)
        for extra, took, scene in zip(beside, computing, scenes, strict=True)
    ]
    at = tuple(float(scene.plan.tokens) for scene in scenes)
    return Rehearsed(Curve(at, tuple(planning)), Curve(at, tuple(rest)), slowdown)


def rehearse_start(
    world: World, config: Config, forward: Forward, scene: Scene, latency_s: float, device: torch.device
) -> float:
    """Seconds from the end of a visit on one rank until the next one's device begins, beyond `latency_s` and planning.

    Every rank calls it. As many rounds as ranks circulate, so that every rank computes or waits for the one before it.
    """
    visits = _visits(scene.alone_s + latency_s)
    takes = [_take(world, config, forward, scene, world.size, visits, device) for _ in range(TAKES)]
    # Rank 0's view counts: it alone plans.
    apart, planning = world.share("rehearsal/start", min((take.apart, take.planning) for take in takes))
    return max(0.0, float(apart) - float(planning) / world.size - scene.alone_s - latency_s)


def _visits(visit_s: float) -> int:
    return max(FEWEST_VISITS, min(MOST_VISITS, int(LONGEST_S / max(visit_s, 1e-6))))


def _take(
    world: World, config: Config, forward: Forward, scene: Scene, rounds: int, visits: int, device: torch.device
) -> _Take:
    rows, hidden = scene.plan.rows, scene.hidden.shape[1]
    pages = 4 * rows * rounds
    layout = Plan((0,), rounds, rows, rows * rounds, rows, "prefill_first", config.kvcache.page_size, pages, 0, 0)
    plain = replace(config, network=replace(config.network, latency_ms=0, bandwidth_mbps=None))
    links = connect(world, plain, layout, hidden * scene.hidden.element_size(), device)
    timeline = Timeline(device=device)
    controller = None
    if links.tokens_in is not None:
        controller = _Controller(scene.plan, layout, visits, links.tokens_in, timeline)
    understudy = cast(Stage, _Understudy(forward, scene.hidden, world.is_last))
    run_pipeline(understudy, links, controller, rounds, hidden, timeline)
    computed = timeline.counts["compute"] - rounds  # the last visit of each round is empty
    planning, computing, waiting = (timeline.totals[kind] / computed for kind in ("plan", "compute", "receive"))
    return _Take(planning, computing, waiting, timeline.elapsed_s / computed)


class _Understudy:
    """Takes a stage's place: its layers compute, whatever comes in."""

    def __init__(self, forward: Forward, hidden: torch.Tensor, last: bool):
        self.dtype = hidden.dtype
        self._forward, self._hidden, self._last = forward, hidden, last

    def forward(self, plan: VisitPlan, x: torch.Tensor, timeline: Timeline) -> torch.Tensor:
        if not plan.rows:
            return torch.empty(0, dtype=torch.int32)
        y = self._forward(plan, self._hidden)
        return y.new_zeros(plan.rows, dtype=torch.int32) if self._last else y

    def end_visit(self, following: int | None, timeline: Timeline) -> None:
        """It has no swap pages."""


class _Controller:
    """Schedules like a run, for the time it takes, and has `plan` visited `visits` times."""

    def __init__(self, plan: VisitPlan, layout: Plan, visits: int, tokens_in: Receiver, timeline: Timeline):
        self._plan, self._left, self._tokens_in, self._timeline = plan, visits, tokens_in, timeline
        self._ids = np.zeros(plan.tokens, np.int32)
        self._scheduler = Scheduler(layout, Alike(1, 3 * layout.page_size))
        self._under_way = 0
        for micro_batch in range(layout.rounds):
            self._scheduler.plan(micro_batch)  # admits its sequences

    def next_visit(self, micro_batch: int) -> tuple[VisitPlan, IntArray]:
        if self._under_way == len(self._scheduler.micro_batches):
            self._collect()
        with self._timeline.span("plan", micro_batch):
            self._scheduler.commit(micro_batch, VisitResult(np.zeros(self._plan.rows, np.int32)))
            self._scheduler.plan(micro_batch)
        self._tokens_in.expect()
        self._under_way += 1
        self._left -= 1
        if self._left < 0:
            return VisitPlan(micro_batch, retires=True), np.zeros(0, np.int32)
        return replace(self._plan, micro_batch=micro_batch), self._ids

    def _collect(self) -> None:
        self._timeline.receive(self._tokens_in, 0)
        self._under_way -= 1

    def close(self) -> None:
        while self._under_way:
            self._collect()
