"""Stragglers: ranks whose visits take longer than the survey says, while those of others do not."""

from collections.abc import Callable

from deserve.batch import VisitPlan
from deserve.layout import Layout
from deserve.planner.times import Machine, Stages, VisitLoad
from deserve.timeline import PACE_VISITS

SLOW = 1.5  # times what the survey says: a straggler
CHANGED = 1.2  # times what the next start was told: it is told anew
FADES = 0.75  # of what is remembered, with each report of a rank


class Pace:
    """Compares the seconds that ranks compute with those of the survey, on rank 0.

    `names` are those of the ranks. `changed` is called, in any thread, with how many times slower than surveyed each
    rank is to be planned at the next start: 1 but for stragglers. Where all ranks are slow there are none, as another
    plan would not help.
    """

    def __init__(self, layout: Layout, machine: Machine, layers: int, names: list[str], changed: Callable[..., object]):
        self._names, self._changed = names, changed
        self._stages, self._window = Stages(machine, layout.partition, layers), machine.window
        self._visits = 0
        self._surveyed = [0.0] * len(self._stages.kinds)  # seconds of all visits so far
        self._marks: dict[int, tuple[float, ...]] = {0: tuple(self._surveyed)}  # the same, by reports of a rank
        self._reports = [0] * machine.ranks
        self._computed = [0.0] * machine.ranks  # seconds, by the last report
        self._recent = [(0.0, 0.0)] * machine.ranks  # seconds computed and surveyed, the latest with the most weight
        self._told = [times.slow for times in machine.stages]

    def planned(self, plan: VisitPlan) -> None:
        """The next visit."""
        load = VisitLoad.of(plan, self._window)
        for index, (times, counts, _, last) in enumerate(self._stages.kinds):
            self._surveyed[index] += times.compute_s(load, counts, last)
        self._visits += 1
        if self._visits % PACE_VISITS == 0:
            self._marks[self._visits // PACE_VISITS] = tuple(self._surveyed)

    def report(self, rank: int, seconds: float) -> None:
        """`rank` has made `PACE_VISITS` more visits, and computed for `seconds` so far."""
        before, now = self._reports[rank], self._reports[rank] + 1
        kind = self._stages.kind_of[rank]
        computed, surveyed = self._recent[rank]
        self._recent[rank] = (
            FADES * computed + seconds - self._computed[rank],
            FADES * surveyed + self._marks[now][kind] - self._marks[before][kind],
        )
        self._computed[rank], self._reports[rank] = seconds, now
        for mark in range(before, min(self._reports)):
            del self._marks[mark]
        slow = [ratio if ratio >= SLOW else 1.0 for ratio in slowness(self._recent)]
        if all(self._reports) and any(
            max(old, new) > CHANGED * min(old, new) for old, new in zip(self._told, slow, strict=True)
        ):
            self._told = slow
            self._changed(slow)

    def stragglers(self) -> str:
        """Who is behind at present, in words; empty if nobody is."""
        return self._words(self._recent)

    def closing(self, computed: list[float]) -> str:
        """Who was behind over the job; `computed`: the seconds of each rank."""
        if self._visits < PACE_VISITS:
            return ""
        return self._words(
            [(seconds, self._surveyed[kind]) for seconds, kind in zip(computed, self._stages.kind_of, strict=True)]
        )

    def _words(self, seconds: list[tuple[float, float]]) -> str:
        found = [(name, ratio) for name, ratio in zip(self._names, slowness(seconds), strict=True) if ratio >= SLOW]
        return ", ".join(f"{name} {ratio:.1f}x as slow as surveyed" for name, ratio in found)


def slowness(seconds: list[tuple[float, float]]) -> list[float]:
    """How many times slower than surveyed each rank is, from what it has computed and what the survey says (s).

    Where all are slower, the least slow is taken for as fast as surveyed. 1 for all until all have reported.
    """
    ratios = [computed / surveyed if surveyed else 0.0 for computed, surveyed in seconds]
    least = min(ratios)
    return [ratio / max(1.0, least) if least else 1.0 for ratio in ratios]
