"""Seconds between two visits of a round: of the trip, or of the queue before the slowest rank or link."""

from dataclasses import replace

import pytest

from deserve.layout import Layout
from deserve.planner.cycle import cycle_times
from deserve.planner.times import Cost, Curve, LinkTimes, Machine, StageTimes

MS = 1e-3


def test_the_longest_of_trip_queue_and_wire() -> None:
    """Two ranks of 3 and 1 layers, 1 ms a layer and 1 ms more for 10 rows."""
    stage = StageTimes((Cost(Curve((0.0, 10.0), (1 * MS, 2 * MS))),))
    layout = Layout((0, 3), 8, 10, 80, 512, "prefill_first", 16, 100, 0, 0)

    def cycle(rounds: int, sequences: int, link: LinkTimes) -> float:
        machine = Machine((stage, stage), (link, link), (1, 1), 1, 1000, 1)
        return cycle_times(layout, machine, 4, 100.0)(rounds, sequences)

    near, far = LinkTimes(0.0, 0.0), LinkTimes(64 * MS, 0.0)
    assert cycle(1, 10, near) == pytest.approx(8 * MS)  # 6 and 2 ms
    assert cycle(2, 20, near) == pytest.approx(12 * MS)  # twice the slower
    assert cycle(2, 20, far) == cycle(8, 80, far) == pytest.approx(136 * MS)
    assert cycle(30, 300, far) == pytest.approx(180 * MS)
    assert cycle(30, 30, far) == pytest.approx(130 * 1.1 * MS, rel=0.1)
    thin = LinkTimes(0.0, 1e-5)  # 10,000 bytes of hidden states and the plan's take 0.1 s and more
    assert cycle(3, 30, thin) > 3 * 100 * MS
    # Drafts cost their tokens: their samples admit no request.
    drafts = []
    for request_s in (0.0, 1.0):
        machine = Machine((replace(stage, request_s=request_s), stage), (near, near), (1, 1), 1, 1000, 1)
        drafts.append(cycle_times(layout, machine, 4, 100.0)(1, 10, 0, 40))
    assert drafts == [pytest.approx(4 * 6 * MS)] * 2
    # A draft model takes rank 0's time: of the trip, or of every round where rank 0 is the slowest.
    times = cycle_times(layout, Machine((stage, stage), (far, far), (1, 1), 1, 1000, 1), 4, 100.0)
    assert times(2, 20, drafting_s=5 * MS) == pytest.approx(141 * MS)
    assert times(30, 300, drafting_s=5 * MS) == pytest.approx(30 * 11 * MS)
