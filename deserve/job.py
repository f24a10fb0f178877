"""A job as rank 0 knows it: its input, its plan and its results."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from deserve.batch import Request
from deserve.comm.link import Receiver
from deserve.config import Config, as_dict
from deserve.controller import Controller
from deserve.errors import LastingError
from deserve.layout import Layout
from deserve.model.checkpoint import Checkpoint, computes_on_cpu, model_dtype
from deserve.model.tokenizer import end_ids, load_tokenizer
from deserve.planner.cycle import cycle_times
from deserve.planner.planner import PLANNED_POLICIES, choose_plan, table
from deserve.planner.simulator import simulate
from deserve.planner.times import Machine
from deserve.report.metrics import write_metrics
from deserve.report.progress import Progress
from deserve.report.recorder import Recorder, remedy
from deserve.report.results import UNFINISHED, WAYS_OUT, Manifest, ResultsWriter
from deserve.report.startup import Startup
from deserve.report.summary import closing_table
from deserve.report.trace import draw_timeline, write_trace
from deserve.report.unfinished import Unfinished
from deserve.scheduler.drafts import CycleTime, Drafts
from deserve.scheduler.forced import Forced
from deserve.scheduler.scheduler import Scheduler
from deserve.stop import Stop
from deserve.text import AnswerReader, Detokenizer, StopFinder
from deserve.timeline import Span, Timeline
from deserve.tuner import Filling, Tuner
from deserve.workload import Item, Limits, Rejected, default_sampling, open_workload, peek_lengths
from deserve.workload.read_ahead import ReadAhead


class Job:
    """What rank 0 knows of a job before and after the visits: its input, its layout and its results.

    With `resume` it goes on from the results in `output.dir`.
    """

    def __init__(self, config: Config, checkpoint: Checkpoint, resume: bool):
        self._config, self._checkpoint = config, checkpoint
        self._on_cpu = computes_on_cpu(config.device)
        self._dtype = model_dtype(config.model, checkpoint.config, self._on_cpu)
        self._defaults = default_sampling(config.sampling, checkpoint.generation)
        self._limits = Limits(checkpoint.config.vocab_size, checkpoint.config.max_context)
        self._folder = Path(config.output.dir)
        self._manifest = Manifest.of(config, checkpoint.fingerprint(), name_of(self._dtype))
        self._writer = ResultsWriter(
            self._folder / "results.jsonl",
            resume,
            checkpoint.name,
            self._manifest,
            config.output.retry_errors,
            config.output.errors == "separate",
        )
        model = [self._manifest.model, self._manifest.dtype, self._manifest.coded]
        self._unfinished = Unfinished(self._folder / UNFINISHED, model, self._writer.done)
        self._tokenizer = load_tokenizer(checkpoint, self._writer.began, config.workload.chat_template)
        self._changed: Path | None = None  # a file that was not read as it was at the start
        self._lengths = peek_lengths(config, self._tokenizer, self._limits, defaults=self._defaults)
        self._count = self._lengths.count
        left = None if self._count is None else self._count - len(self._writer.done)
        if left is not None and left != self._count:
            self._lengths = replace(self._lengths, count=max(1, left), sizes=())  # the plan is for what is left
        self._progress = Progress(left, config.warmup_s)

    def plan(self, machine: Machine, dtype: torch.dtype) -> Layout:
        """The layout of this job on `machine`, shown. Raises UserError if one that was set by hand cannot work."""
        model = self._checkpoint.config
        self._machine = machine
        layout = choose_plan(self._config, model, dtype, self._lengths, machine)
        print(table(layout, model.num_layers, self._lengths.exact), flush=True)
        if self._on_cpu and self._config.model.dtype == "auto":
            other = model.dtype != dtype
            why = f": this CPU has no instructions for {name_of(model.dtype)}, the checkpoint's dtype" if other else ""
            print(f"computes in {name_of(dtype)}{why}", flush=True)
        return layout

    def controller(
        self, layout: Layout, tokens_in: Receiver, stop: Stop, timeline: Timeline, startup: Startup
    ) -> Controller:
        """Open the workload and start reading. `startup` has the steps so far."""
        self._startup = self._progress.startup = startup
        self._recorder = Recorder(
            self._writer, self._unfinished, AnswerReader(self._tokenizer), self._progress, self._dtype
        )
        # From here, as tokenising the first prompts is work too; it goes on behind the visits.
        self._progress.start()
        self._ignored: Counter[str] = Counter()
        done, switch = self._writer.done, self._checkpoint.config.rope_switch
        requests = open_workload(
            self._config, self._tokenizer, self._limits, self._defaults, done=done, ignored=self._ignored
        )
        items = (
            within_memory(within_rope(item, switch), layout.main_pages + layout.swap_pages, layout.page_size)
            for item in self._counted(requests)
        )
        continued, record = self._unfinished.continued, self._recorder.put
        # Who is admitted when must not depend on the speed of reading where equal plans are to make equal visits.
        until = None if self._config.pipeline.tune else lambda: stop.reason is not None
        size = max(1024, 2 * layout.concurrency)
        self._ahead = ahead = ReadAhead(items, done, continued, record, size, until)
        reorders = self._config.workload.order == "auto"
        context = self._lengths.mean_prompt + self._lengths.mean_output
        cycle_s = cycle_times(layout, self._machine, self._checkpoint.config.num_layers, context)
        self._drafts = self._make_drafts(layout.concurrency, cycle_s)
        scheduler = Scheduler(
            layout,
            ahead,
            eos_ids=end_ids(self._checkpoint, self._tokenizer),
            find_cuts=StopFinder(Detokenizer(self._tokenizer)),
            share_prefixes=self._config.kvcache.share_prefixes,
            grouped=reorders,
            # Where every token costs the same, mixing gains little, and uneven visits cost something.
            mixed=reorders and self._machine.reading_binds(layout.micro_batch_size),
            rope_switch=self._checkpoint.config.rope_switch,
            cycle_s=cycle_s,
            drafter=self._drafts,
        )
        self._counters, self._host_pool = scheduler.counters, scheduler.pages.host
        self._prefixes = scheduler.pages.prefixes
        ahead.wait(layout.concurrency)
        self._tuner = self._make_tuner(layout)
        return Controller(
            scheduler,
            tokens_in,
            ahead,
            self._recorder,
            self._progress,
            stop,
            timeline,
            self._tuner,
            self._config.output.checkpoint_s,
        )

    def _make_drafts(self, slots: int, cycle_s: CycleTime) -> Drafts | None:
        """What guesses draft tokens, if any are to be guessed."""
        tokens = self._config.speculation.tokens
        if not tokens:
            return None
        forced = None
        if (tokenizer := self._tokenizer) is not None:
            vocab, ends = self._limits.vocab_size, end_ids(self._checkpoint, tokenizer)
            forced = Forced(lambda: tokenizer.guide(vocab, ends))
        return Drafts(slots, cycle_s, None if tokens == "auto" else tokens, forced)

    def _make_tuner(self, layout: Layout) -> Tuner:
        """The tuner of what `layout` leaves to it: nothing that was set by hand."""
        pipeline = self._config.pipeline
        begin = Filling(layout.policy, layout.visit_tokens or layout.max_batch_tokens, layout.micro_batch_size)
        most = replace(begin, tokens=layout.max_batch_tokens)
        by_knob = {"policy": pipeline.policy, "tokens": pipeline.max_batch_tokens, "rows": pipeline.micro_batch_size}
        knobs = tuple(knob for knob, stated in by_knob.items() if stated == "auto" and pipeline.tune)
        return Tuner(begin, most, knobs, PLANNED_POLICIES, self._lengths.sequences)

    def _counted(self, items: Iterator[Item]) -> Iterator[Item]:
        """As many of `items` as were counted at the start; what is appended meanwhile is for the next start."""
        yield from islice(items, self._count)
        self._changed = self._manifest.changed_file()

    def report(
        self, layout: Layout, stages: list[dict[str, Any]], spans: list[list[list[Any]]], stopped: str | None
    ) -> None:
        """Write `metrics.json` and, if `spans` of each rank were kept, the trace; say where everything lies.

        Raises LastingError if not all requests were answered, although nothing stopped the job.
        """
        self._progress.close()
        if spans:
            ranks = [[Span(*span) for span in rank] for rank in spans]
            write_trace(self._folder / "trace.json", ranks)
            latency = self._config.network.latency_ms
            title = f"{self._checkpoint.name}, {len(ranks)} ranks, {layout.rounds} rounds, links of {latency:g} ms"
            draw_timeline(self._folder / "timeline.png", ranks, title)
        metrics = {
            **self._progress.summary(),
            "stopped_by": stopped,
            "ignored_keys": dict(self._ignored),
            "non_finite_logits": {"requests": self._recorder.non_finite, "remedy": remedy(self._dtype)},
            "earlier_starts": {"results": len(self._writer.done), "errors_tried_again": self._writer.retried},
            "startup_s": self._startup.seconds,
            "resumed_answers": self._unfinished.resumed,
            "resumed_tokens": self._unfinished.resumed_tokens,
            "stages": stages,
            "memory_pressure": {
                **asdict(self._counters),
                "evicted_prefix_pages": self._prefixes.evicted,
                "host_pool_pages": self._host_pool.pages,
                "most_host_pages_used": self._host_pool.pages - self._host_pool.least_free,
            },
            "plan": {
                **layout.to_json(),
                "predicted_output_tokens_per_s": layout.predicted,
                "predicted_for_these_answers": self._hindsight(layout),
            },
            "tuning": self._tuner.report(),
            "speculation": self._drafts.report() if self._drafts is not None else None,
            "machine": asdict(self._machine),
            "config": as_dict(self._config),
        }
        write_metrics(self._folder / "metrics.json", metrics)
        print(closing_table(metrics))
        print(f"results in {self._writer.path}", flush=True)
        if stopped is None:
            self._check_whole(metrics["requests"])

    @property
    def whole(self) -> bool:
        """Whether every request that was counted has its line."""
        return self._ahead.exhausted and self._ahead.skipped + self._progress.recorded == self._count

    def _check_whole(self, recorded: int) -> None:
        """Raises LastingError unless there are results for all that was counted, and it was read as it was counted."""
        begun = self._ahead.read if self._count is None else self._count
        answered = self._ahead.skipped + recorded
        source = f"workload.source={self._config.workload.source}"
        changed = f"{self._changed} was changed while the job ran" if self._changed else ""
        if answered != begun:
            raise LastingError(
                f"{source}: {begun:,} requests were counted, and {answered:,} have results: {begun - answered:,} are "
                f"missing{changed and f'. {changed}'}. Restore the input and start again. {WAYS_OUT}"
            )
        if changed:
            raise LastingError(f"{source}: {changed}, so results may answer lines that it no longer holds. {WAYS_OUT}")

    def _hindsight(self, layout: Layout) -> float | None:
        """Output tokens/s that `layout` would have promised, had the lengths of the answers been known."""
        if self._lengths.exact or layout.predicted is None:
            return None
        sizes = tuple((prompt, max(1, answer)) for _, prompt, answer in sorted(self._progress.answered))
        if not sizes:
            return None
        counts = self._progress.summary()
        count = counts["requests"] - counts["errors"]
        prompts, answers = zip(*sizes, strict=True)
        lengths = replace(
            self._lengths,
            count=count,
            mean_prompt=sum(prompts) / len(sizes),
            mean_output=sum(answers) / len(sizes),
            sizes=sizes if len(sizes) == round(count * self._lengths.answers) else (),
        )
        return simulate(layout, lengths, self._machine, self._checkpoint.config.num_layers).tokens_per_s


def within_rope(item: Item, switch: int) -> Item:
    """`item`, rejected if its answer may take it beyond `switch` tokens, where longrope changes its frequencies.

    All keys before would have to be computed again.
    """
    if not (isinstance(item, Request) and switch):
        return item
    sizes = [(len(one.prompt), one.sampling.max_tokens) for one in (item, *item.others)]
    crossing = next((size for size in sizes if size[0] <= switch < sum(size) - 1), None)
    if crossing is None:
        return item
    prompt, answer = crossing
    return Rejected(
        item.custom_id,
        item.line,
        "context_length_exceeded",
        f"a prompt of {prompt} tokens and max_tokens={answer} cross {switch} tokens "
        "(original_max_position_embeddings), where longrope changes from its short to its long factors: ask for at "
        f"most {switch - prompt + 1} tokens, or for an answer to a prompt of more than {switch}",
    )


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def within_memory(item: Item, pages: int, page_size: int) -> Item:
    """`item`, rejected if it may come to hold more than `pages` pages of KV cache, as then it could never finish."""
    if not isinstance(item, Request):
        return item
    sizes = [(len(one.prompt), one.sampling.max_tokens) for one in (item, *item.others)]
    prompt, answer = max(sizes, key=sum)
    if prompt + answer - 1 <= pages * page_size:
        return item
    which = f"prompt[{sizes.index((prompt, answer))}]: " if item.others else ""
    return Rejected(
        item.custom_id,
        item.line,
        "kv_memory_exceeded",
        f"{which}a prompt of {prompt} tokens and max_tokens={answer} need room for {prompt + answer - 1} tokens (the "
        f"last one is not computed), but {pages} pages of {page_size} tokens hold {pages * page_size}: ask for fewer "
        "tokens, or give the job more pages (kvcache.main_pages, kvcache.swap_pages)",
    )
