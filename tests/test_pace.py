"""Stragglers: found, named, and planned for."""

import json
import socket
from pathlib import Path

import numpy as np
from launch import run_ranks

from deserve.batch import VisitPlan
from deserve.layout import Layout
from deserve.planner.pace import Pace, slowness
from deserve.planner.times import Cost, Curve, LinkTimes, Machine, StageTimes
from deserve.timeline import PACE_VISITS

LAYOUT = Layout((0, 2, 4), 2, 4, 8, 8, "vanilla", 16, 8, 0, 0)
TIMES = StageTimes((Cost(Curve((0.0,), (0.001,))),), Cost(Curve((0.0,), (0.002,))), head=Curve((0.0,), (0.004,)))
PLAN = VisitPlan(0, slots=np.arange(4, dtype=np.int32), new_tokens=np.ones(4, np.int32), context=np.ones(4, np.int32))
SURVEYED = [0.004, 0.004, 0.008]  # of a visit


def test_slowness() -> None:
    assert slowness([(2.0, 1.0), (1.0, 1.0), (0.5, 1.0)]) == [2.0, 1.0, 0.5]
    assert slowness([(4.0, 1.0), (2.0, 1.0)]) == [2.0, 1.0]  # all are slow
    assert slowness([(4.0, 1.0), (0.0, 0.0)]) == [1.0, 1.0]  # not all have reported
    assert slowness([(9.0, 1.0)]) == [1.0]


def test_a_rank_falls_behind_and_recovers() -> None:
    told: list[list[float]] = []
    machine = Machine((TIMES,) * 3, (LinkTimes(),) * 3, (0,) * 3, 0, 0, 0)
    pace = Pace(LAYOUT, machine, 6, ["rank 0 on a", "rank 1 on b", "rank 2 on b"], told.append)
    computed = [0.0] * 3

    def go_on(reports: int, *factors: float) -> None:
        for _ in range(reports * PACE_VISITS):
            pace.planned(PLAN)
        for rank, factor in enumerate(factors):  # a rank may report several times before another one does
            for _ in range(reports):
                computed[rank] += factor * SURVEYED[rank] * PACE_VISITS
                pace.report(rank, computed[rank])

    go_on(5, 1.0, 1.1, 1.0)
    assert not told and pace.stragglers() == pace.closing(computed) == ""
    go_on(10, 1.0, 1.1, 3.0)
    assert told[-1][:2] == [1.0, 1.0] and 2.4 < told[-1][2] < 3.1
    assert pace.stragglers() == "rank 2 on b 2.9x as slow as surveyed" and len(told) < 5
    go_on(30, 1.0, 1.0, 1.0)
    assert told[-1] == [1.0, 1.0, 1.0] and not pace.stragglers()
    assert pace.closing([46.0, 46.0, 200.0]).startswith("rank 2 on b ")
    assert len(pace._marks) == 1
    # The next start plans for what it was told, and goes on telling by what the survey has measured.
    told.clear()
    slow = Machine(
        (TIMES, TIMES, StageTimes(TIMES.layers, TIMES.visit, TIMES.head, slow=3.0)),
        *[(LinkTimes(),) * 3, (0,) * 3],
        0,
        0,
        0,
    )
    pace = Pace(LAYOUT, slow, 6, ["a", "b", "c"], told.append)
    computed = [0.0] * 3
    go_on(5, 1.0, 1.0, 3.1)
    assert not told and pace.stragglers().startswith("c 3.1x")
    go_on(20, 1.0, 1.0, 1.0)
    assert told[-1] == [1.0, 1.0, 1.0]


def test_a_straggler_is_named_and_gets_fewer_layers_at_the_next_start(tmp_path: Path) -> None:
    job = ["model=tiny", "workload.source=fixed16:8:2", "sampling.max_tokens=16", "sampling.ignore_eos=true"]
    job += ["pipeline.rounds=2", "pipeline.micro_batch_size=4", "speculation.tokens=0"]
    done = run_ranks(2, "pace_worker.py", *job, f"output.dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    named = f"rank 1 on {socket.gethostname()} "
    assert any(line.startswith("deserve: 16/16") and named in line for line in done.stderr.splitlines()), done.stderr
    assert f"straggler: {named}" in done.stdout
    assert done.stdout.count("rank 1 is planned ") == 1 and "rank 0 is planned" not in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["plan"]["partition"] == [0, 3] and metrics["machine"]["stages"][1]["slow"] > 1.5
