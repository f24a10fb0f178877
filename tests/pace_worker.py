"""`pace_worker.py [overrides]`: one job, twice in one process group, with a rank 1 that is slower than surveyed.

The survey is given, and so is what visits take: measured times may be anything on a machine that others use.
"""

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import deserve.planner.pace
import deserve.timeline
from deserve import run
from deserve.comm.world import World
from deserve.config import load_config
from deserve.planner import survey
from deserve.planner.pace import Pace
from deserve.planner.times import Cost, Curve, StageTimes
from deserve.timeline import Timeline

if __name__ == "__main__":
    config, world = load_config(sys.argv[1:]), World()
    deserve.timeline.PACE_VISITS = deserve.planner.pace.PACE_VISITS = 16
    surveyed = asdict(StageTimes((Cost(Curve((0.0,), (0.004,))),)))
    first = {"stages": [[surveyed, 0]] * 2}
    survey.read_kept = lambda kept, key: (survey.read_surveys(kept) or [first])[0]["stages"]
    add = Timeline.add

    def given(timeline: Timeline, kind: str, micro_batch: int, begin: int, end: int) -> None:
        add(timeline, kind, micro_batch, begin, begin + (8, 50)[world.rank] * 1_000_000 if kind == "compute" else end)

    Timeline.add = given
    report, heard = Pace.report, Counter[Pace]()

    def counted(pace: Pace, rank: int, seconds: float) -> None:
        heard[pace] += 1
        report(pace, rank, seconds)

    Pace.report = counted
    assert run.run(config, world) == 0
    if world.rank == 0:
        (Path(config.output.dir) / "results.jsonl").unlink()  # under one torchrun a job is not done twice
    assert run.run(config, world) == 0
    # Each job of about as many visits hears as many reports: those of one are not taken for those of the other.
    assert world.rank or (len(heard) == 2 and min(heard.values()) >= 6), heard
    world.leave()
