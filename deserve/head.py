"""A ring's first rank: it schedules the visits of its ring, wherever requests come from and results go."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from deserve.comm.link import Receiver
from deserve.config import Config
from deserve.controller import Controller, Outcomes, Requests, TokenCounts
from deserve.draft_model import DraftModel
from deserve.layout import Layout
from deserve.model.checkpoint import Checkpoint
from deserve.model.tokenizer import ByteTokenizer, Tokenizer, end_ids
from deserve.planner.cycle import cycle_times
from deserve.planner.planner import PLANNED_POLICIES
from deserve.planner.times import Machine
from deserve.report.sample import Sample
from deserve.scheduler.drafts import CycleTime, Drafts
from deserve.scheduler.forced import Forced
from deserve.scheduler.scheduler import Scheduler
from deserve.stop import Stop
from deserve.text import Detokenizer, StopFinder
from deserve.timeline import Timeline
from deserve.tuner import Filling, Tuner
from deserve.workload.read_ahead import ReadAhead


@dataclass(frozen=True)
class RingPlan:
    """What rank 0 tells a ring: its layout, the times that this was made from, and the work that is expected.

    `context`: mean tokens of a prompt and its answer. `sequences`: answers to give, None: nobody knows.
    """

    layout: Layout
    machine: Machine
    context: float
    sequences: int | None

    @property
    def most_requests(self) -> int:
        """Requests that the ring may have at once: those in flight, and some to choose from."""
        return self.layout.concurrency + max(16, self.layout.concurrency // 2)


class Head:
    """Schedules one ring. `requests` are where its work comes from, `outcomes` where that goes."""

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | ByteTokenizer | None,
        plan: RingPlan,
        draft_model: DraftModel | None,
        requests: Requests,
    ):
        self.plan, self._config, self._requests = plan, config, requests
        layout, machine = plan.layout, plan.machine
        reorders = config.workload.order == "auto"
        cycle_s = cycle_times(layout, machine, checkpoint.config.num_layers, plan.context)
        self._drafts = self._make_drafts(checkpoint, tokenizer, cycle_s, draft_model)
        self._scheduler = Scheduler(
            layout,
            requests,
            eos_ids=end_ids(checkpoint, tokenizer),
            find_cuts=StopFinder(Detokenizer(tokenizer)),
            share_prefixes=config.kvcache.share_prefixes,
            grouped=reorders,
            # Where every token costs the same, mixing gains little, and uneven visits cost something.
            mixed=reorders and machine.reading_binds(layout.micro_batch_size),
            rope_switch=checkpoint.config.rope_switch,
            cycle_s=cycle_s,
            drafter=self._drafts,
        )
        self._tuner = self._make_tuner(layout)

    def controller(
        self, tokens_in: Receiver, outcomes: Outcomes, counts: TokenCounts, stop: Stop, timeline: Timeline
    ) -> Controller:
        return Controller(
            self._scheduler,
            tokens_in,
            self._requests,
            outcomes,
            counts,
            stop,
            timeline,
            self._tuner,
            self._config.output.checkpoint_s,
        )

    def _make_drafts(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | ByteTokenizer | None,
        cycle_s: CycleTime,
        draft_model: DraftModel | None,
    ) -> Drafts | None:
        """What guesses draft tokens, if any are to be guessed."""
        tokens = self._config.speculation.tokens
        if not tokens:
            return None
        forced = None
        if tokenizer is not None:
            guide = partial(tokenizer.guide, checkpoint.config.vocab_size, end_ids(checkpoint, tokenizer))
            forced = Forced(guide)
        return Drafts(self.plan.layout.concurrency, cycle_s, None if tokens == "auto" else tokens, forced, draft_model)

    def _make_tuner(self, layout: Layout) -> Tuner:
        """The tuner of what `layout` leaves to it: nothing that was set by hand."""
        pipeline = self._config.pipeline
        begin = Filling(layout.policy, layout.visit_tokens or layout.max_batch_tokens, layout.micro_batch_size)
        most = replace(begin, tokens=layout.max_batch_tokens)
        by_knob = {"policy": pipeline.policy, "tokens": pipeline.max_batch_tokens, "rows": pipeline.micro_batch_size}
        knobs = tuple(knob for knob, stated in by_knob.items() if stated == "auto" and pipeline.tune)
        return Tuner(begin, most, knobs, PLANNED_POLICIES, self.plan.sequences)

    def sample(self, ahead: ReadAhead, timeline: Timeline) -> Sample:
        """The state of this ring now; `ahead` reads the workload."""
        return Sample.of(self._scheduler, ahead, self._drafts, timeline)

    def report(self) -> dict[str, Any]:
        """What `metrics.json` has of this ring beside its stages."""
        layout, pages = self.plan.layout, self._scheduler.pages
        return {
            "memory_pressure": {
                **asdict(self._scheduler.counters),
                "evicted_prefix_pages": pages.prefixes.evicted,
                "host_pool_pages": pages.host.pages,
                "most_host_pages_used": pages.host.pages - pages.host.least_free,
            },
            "plan": {**asdict(layout), "predicted_output_tokens_per_s": layout.predicted},
            "tuning": self._tuner.report(),
            "speculation": self._drafts.report() if self._drafts is not None else None,
            "machine": asdict(self.plan.machine),
        }
