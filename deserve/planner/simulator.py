"""A simulation of a job: the scheduler of a run decides each visit, and a ring of known speed takes its time for it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from deserve.batch import Request, SamplingParams, VisitResult
from deserve.layout import Layout
from deserve.model.backend.torch import SHARED_PAGES
from deserve.planner.cycle import cycle_times
from deserve.planner.times import Machine, Stages, VisitLoad
from deserve.scheduler.scheduler import Scheduler
from deserve.workload import Lengths

WAVES = 5  # of a long job's sequences that are simulated; all but the first and the last are usual ones: at least 3
MOST_VISITS = 1_500  # of a simulation, which then takes about half a second
FEWEST_STEPS = 16  # that an answer takes in a simulation, however coarse
ENOUGH_ROWS, MOST_ALIKE = 128, 4  # in a visit of more rows one stands for several: at most for so many
NOTHING_SHARED = Lengths(None, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Outcome:
    """What came of a simulated job."""

    seconds: float
    output_tokens: int
    visits: int  # simulated
    tail: float  # fraction of the time in which no request waits and less than half of the ring's sequences are left

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


def simulate(
    layout: Layout, lengths: Lengths, machine: Machine, layers: int, waves: int = WAVES, most_visits: int = MOST_VISITS
) -> Outcome:
    """The job of `lengths` under `layout`, of a model of `layers` layers, from the first visit to the last token.

    Requests have the mean lengths, unless those of each are known. Of a job of many alike only `waves` waves of
    `layout.concurrency` sequences are simulated, and its last; those between take as long as the usual ones of these.
    The first and the last are not: waves overlap where prompts and answers mix (`decode_first`), and where sequences
    are suspended a long wave follows a short one. A job of more than `most_visits` visits is simulated coarsely, and
    one that has not ended even so after twice as many is taken to go on as it began. Of large micro-batches of requests
    alike, a sequence is simulated for several.
    """
    wave = layout.concurrency
    count = lengths.sequences or 10 * wave
    simulated = count if count <= (waves + 1) * wave or lengths.sizes else waves * wave + count % wave
    usual = max(1, round(lengths.mean_prompt)), max(1, round(lengths.mean_output))
    bundle = 1 if lengths.sizes else _bundle(layout, sum(usual), lengths.shared)
    sizes = lengths.sizes or [usual] * -(-simulated // bundle)
    output = sum(answer for _, answer in lengths.sizes) or count * usual[1]
    visits = layout.rounds * simulated / wave * usual[1]
    grain = _grain(layout, min((answer for _, answer in sizes), default=1), visits / most_visits)
    run = Simulation(layout, sizes, machine, layers, grain, lengths, bundle=bundle)
    run.run(2 * most_visits)
    between = 0.0
    if not run.scheduler.finished:
        between = run.now * (output / max(1, run.sampled) - 1)
    elif count > simulated:
        between = (run.finished_at((waves - 1) * wave) - run.finished_at(wave)) / (waves - 2)
        between *= (count - simulated) / wave
    elapsed = max(run.now, 1e-9)
    tail = run.tail_s / (elapsed + between)
    return Outcome(grain * (elapsed + between), output, run.visits, tail)


def read_once(machine: Machine, lengths: Lengths, page_size: int, rows: float) -> float:
    """Tokens that `rows` decode rows share with others of them, where attention does not read these for each row."""
    again = lengths.read_again(rows)
    return again if again >= SHARED_PAGES * page_size and not machine.stages[0].ahead else 0.0


def _bundle(layout: Layout, tokens: int, shared: float) -> int:
    """For how many sequences of `tokens` tokens, the first `shared` of them a common prefix, one is simulated."""
    pages = layout.main_pages / layout.rounds + layout.swap_pages
    rows = min(layout.micro_batch_size, int(pages // -(-tokens // layout.page_size)))
    # The prefix has its pages once, however many sequences there are: they must not count.
    most = layout.main_pages * layout.page_size // (50 * shared) if shared else MOST_ALIKE
    return max(1, int(min(MOST_ALIKE, rows // ENOUGH_ROWS, most)))


def _grain(layout: Layout, answer: int, wanted: float) -> int:
    """How many visits alike a simulated one stands for: `wanted` as far as the shortest answer and a page divide."""
    most = min(answer // FEWEST_STEPS, math.gcd(layout.page_size, 2**10) // 2)
    grain = 1
    while grain < wanted and 2 * grain <= most:
        grain *= 2
    return grain


class Simulation:
    """A job of requests of the lengths `sizes` (prompt, answer) under way: its scheduler, and the clocks of the ring.

    A simulated visit stands for `grain` visits alike. Tokens are counted, and pages hold them, in units of `grain`: in
    `grain` visits a decode row gets one unit, and the token budget is as many units as it is tokens in one visit.
    Clocks run `grain` times as fast. A simulated sequence stands for `bundle` sequences alike: there are as many times
    fewer of them, of pages and of tokens in a visit, whose load counts as often.
    """

    def __init__(
        self,
        layout: Layout,
        sizes: Iterable[tuple[int, int]],
        machine: Machine,
        layers: int,
        grain: int = 1,
        sharing: Lengths = NOTHING_SHARED,
        mixed: bool = False,
        bundle: int = 1,
    ) -> None:
        """`sharing` says what the prompts have in common. `mixed`: see Scheduler."""
        self.layout, self.machine, self.sharing = layout, machine, sharing
        self.grain, self.bundle = grain, bundle
        reach = (layout.main_pages + layout.swap_pages) * layout.page_size
        fitting = [size for size in sizes if sum(size) - 1 <= reach]  # a run refuses the others
        pages = round(sharing.shared / layout.page_size)
        self.requests = Requests(
            ((-(-prompt // grain), 1 + round((answer - 1) / grain)) for prompt, answer in fitting),
            pages * layout.page_size // grain,
            sharing.readers,
        )
        context = sum(map(sum, fitting)) / max(1, len(fitting))
        coarse = replace(layout, page_size=layout.page_size // grain)
        if layout.sliding_pages:  # beside those of sequences, as many as the tokens of `grain` visits may need
            more = layout.max_batch_tokens // coarse.page_size - layout.max_batch_tokens // layout.page_size
            coarse = replace(coarse, sliding_pages=layout.sliding_pages + more, window=-(-layout.window // grain))
        self.swap_pages = layout.swap_pages // bundle
        if bundle > 1:
            coarse = replace(
                coarse,
                micro_batch_size=-(-layout.micro_batch_size // bundle),
                concurrency=-(-layout.concurrency // bundle),
                max_batch_tokens=layout.max_batch_tokens // bundle,
                visit_tokens=layout.visit_tokens // bundle,
                main_pages=layout.main_pages // bundle,
                swap_pages=self.swap_pages,
                sliding_pages=coarse.sliding_pages // bundle,
                host_height=max(0, layout.host_height - round(math.log2(bundle))),
            )
        cycle_s = cycle_times(layout, machine, layers, context)
        self.scheduler = Scheduler(coarse, self.requests, cycle_s=cycle_s, share_prefixes=pages > 0, mixed=mixed)
        self.visits = self.sampled = 0
        self.done: list[tuple[int, float]] = [(0, 0.0)]  # requests finished, by when
        self.now = self.tail_s = 0.0
        self.most_in_flight = 0
        # The ring: when each rank is free, each link's wire, and when each micro-batch's tokens are back.
        ranks = machine.ranks
        self.free, self.wire = [0.0] * ranks, [0.0] * ranks
        self.planned = 0.0  # when the host of rank 0 had planned its last visit
        self.back = [0.0] * layout.rounds
        self.stages = Stages(machine, layout.partition, layers)

    def run(self, most_visits: int) -> None:
        """Visit the micro-batches in turn until all have retired, or `most_visits` were made."""
        turn = list(range(self.layout.rounds))
        while turn and self.visits < most_visits:
            turn = [micro_batch for micro_batch in turn if self._visit(micro_batch)]

    def finished_at(self, count: int) -> float:
        """When `count` requests had been finished."""
        return next(time for finished, time in self.done if finished >= count)

    def _visit(self, m: int) -> bool:
        """Whether the micro-batch `m` goes on."""
        before = self.now
        self.now = max(self.planned if self.machine.stages[0].ahead else self.free[0], self.back[m])
        if self.requests.exhausted and 2 * self.scheduler.in_flight < self.most_in_flight:
            self.tail_s += max(0.0, self.now - before)
        result = VisitResult(np.zeros(self.scheduler.awaited(m), np.int32))
        completions = self.scheduler.commit(m, result)
        if completions:
            self.done.append((self.done[-1][0] + self.bundle * len(completions), self.now))
        plan, _ = self.scheduler.plan(m)
        self.most_in_flight = max(self.most_in_flight, self.scheduler.in_flight)
        if plan.retires:
            return False
        self.visits += 1
        self.sampled += plan.sampled * self.grain * self.bundle
        swapped = self.swap_pages - self.scheduler.pages.free_swap(m) if self.layout.rounds > 1 else 0
        each = VisitLoad.of(plan, self.machine.window, swapped, self.grain)
        load = VisitLoad(*(self.bundle * count for count in each))
        again = read_once(self.machine, self.sharing, self.layout.page_size, load.decodes)
        self.travel(m, load._replace(decode_kv=load.decode_kv - again, pairs=load.pairs + again))
        return True

    def travel(self, m: int, load: VisitLoad) -> None:
        """The visit's way round the ring: each rank in turn as soon as it is free and the frame is there."""
        machine, free, wire = self.machine, self.free, self.wire
        seconds, copies, wires = self.stages.seconds(load), self.stages.copies(load), self.stages.wires(load)
        arrival = self.now
        self.planned = self.now + machine.stages[0].host_s(load, True)
        for rank, link in enumerate(machine.links):
            begin = max(free[rank], arrival + machine.start_s(rank))
            end = begin + seconds[rank]
            free[rank] = max(end, begin + copies[rank])
            wire[rank] = max(wire[rank], end) + wires[rank]
            arrival = wire[rank] + link.latency_s
        self.back[m] = arrival


class Requests:
    """A source of requests of the given lengths, prompt and answer.

    So many in a row as are `readers` begin with the same `shared` tokens.
    """

    def __init__(self, sizes: Iterable[tuple[int, int]], shared: int = 0, readers: float = math.inf):
        self._left = list(sizes)[::-1]
        self._shared, self._readers, self._polled = shared, readers, 0

    def poll(self) -> Request | None:
        """The next request; None once there is none."""
        if not self._left:
            return None
        length, answer = self._left.pop()
        prompt = np.full(length, 2 * self._polled + 1, np.int32)
        prompt[: self._shared] = 2 * (self._polled // self._readers)
        self._polled += 1
        return Request("", prompt, SamplingParams(max_tokens=answer, ignore_eos=True))

    @property
    def exhausted(self) -> bool:
        return not self._left
