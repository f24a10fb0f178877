"""`pace_worker.py [overrides]`: one job, twice in one process group, with a rank 1 that is slower than surveyed.

The survey is given, as a measured one may be anything on a machine that others use.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import deserve.planner.pace
import deserve.timeline
from deserve import run
from deserve.comm.world import World
from deserve.config import load_config
from deserve.planner import survey
from deserve.planner.pace import Pace
from deserve.planner.times import Cost, Curve, StageTimes

if __name__ == "__main__":
    config, world = load_config(sys.argv[1:]), World()
    deserve.timeline.PACE_VISITS = deserve.planner.pace.PACE_VISITS = 16
    surveyed = StageTimes((Cost(Curve((0.0,), (0.004,))),)).to_json()
    first = {"stages": [[surveyed, 0]] * 2}
    survey.read_kept = lambda kept, key: (survey.read_surveys(kept) or [first])[0]["stages"]
    run_pipeline = run.run_pipeline

    def slowed(stage: Any, *more: Any) -> None:
        forward = stage.forward

        def slow(*arguments: Any) -> Any:
            time.sleep(0.05)
            return forward(*arguments)

        stage.forward = slow if world.rank == 1 else forward
        run_pipeline(stage, *more)

    run.run_pipeline = slowed
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
