"""A job as rank 0 knows it: its input, its plan and its results."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deserve.batch import Request
from deserve.comm.link import Receiver
from deserve.comm.world import World
from deserve.config import Config, as_dict
from deserve.controller import Controller
from deserve.dispatch.client import Client
from deserve.dispatch.dispatcher import Dispatcher
from deserve.draft_model import DraftMemory, DraftModel, draft_checkpoint
from deserve.errors import LastingError, UserError
from deserve.head import Head, RingPlan
from deserve.layout import Layout
from deserve.model.checkpoint import Checkpoint, computes_on_cpu, model_dtype
from deserve.model.tokenizer import load_tokenizer
from deserve.planner.pace import Pace
from deserve.planner.replicas import choose_rings, part, ring_table
from deserve.planner.simulator import simulate
from deserve.planner.times import Machine
from deserve.report.metrics import write_metrics
from deserve.report.page import write_page
from deserve.report.progress import Progress
from deserve.report.recorder import Recorder, remedy
from deserve.report.results import UNFINISHED, WAYS_OUT, Manifest, ResultsWriter
from deserve.report.startup import Startup
from deserve.report.summary import closing_table
from deserve.report.trace import draw_timelines, write_trace
from deserve.report.unfinished import Unfinished
from deserve.stop import Stop
from deserve.text import AnswerReader
from deserve.timeline import Span, Timeline
from deserve.workload import Item, Limits, Rejected, default_sampling, open_workload, peek_lengths
from deserve.workload.read_ahead import ReadAhead

AHEAD = 1024  # requests that are read ahead, if not more
LOOK_S = 2.0  # for rings to begin with as many


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
        draft_model = config.speculation.model
        self._draft_checkpoint = (
            None if draft_model is None else draft_checkpoint(draft_model, checkpoint, self._tokenizer)
        )
        self._draft_memory: DraftMemory | None = None
        self._draft_model: DraftModel | None = None
        left = None if self._count is None else self._count - len(self._writer.done)
        if left is not None and left != self._count:
            self._lengths = replace(self._lengths, count=max(1, left), sizes=())  # the plan is for what is left
        self._progress = Progress(left, config.warmup_s)
        self._dispatcher: Dispatcher | None = None  # where there are several rings
        self._exporter = None
        if config.report.metrics_port:
            from deserve.report.exporter import Exporter

            host, port = config.report.metrics_host, config.report.metrics_port
            self._exporter = Exporter(host, port, checkpoint.name, self._progress.now)
        self._pace: Pace | None = None  # where there is one

    def plan(self, machine: Machine, dtype: torch.dtype) -> list[RingPlan]:
        """The plan of each ring of this job on `machine`, shown. Raises UserError if one set by hand cannot work."""
        model = self._checkpoint.config
        config = self._config
        if self._draft_checkpoint is not None:
            if config.pipeline.replicas not in ("auto", 1):
                raise UserError(
                    f"speculation.model is for one ring, and pipeline.replicas={config.pipeline.replicas} makes "
                    "several: leave one of them out"
                )
            config = replace(config, pipeline=replace(config.pipeline, replicas=1))
            first, *others = machine.memory
            self._draft_memory = DraftMemory.within(self._draft_checkpoint, first, config.kvcache.page_size, dtype)
            machine = replace(machine, memory=(first - self._draft_memory.bytes, *others))
        rings, why = choose_rings(config, model, dtype, self._lengths, machine)
        if why:
            print(why)
        print(ring_table([layout for layout, _ in rings], model.num_layers, self._lengths.exact), flush=True)
        if self._on_cpu and self._config.model.dtype == "auto":
            other = model.dtype != dtype
            why = f": this CPU has no instructions for {name_of(model.dtype)}, the checkpoint's dtype" if other else ""
            print(f"computes in {name_of(dtype)}{why}", flush=True)
        for rank, times in enumerate(machine.stages):
            if times.slow > 1:
                print(f"rank {rank} is planned {times.slow:.1f}x as slow as surveyed: so it was in an earlier start")
        self._machine = machine
        context = self._lengths.mean_prompt + self._lengths.mean_output
        sequences = part(self._lengths, len(rings)).sequences
        return [RingPlan(layout, ring, context, sequences) for layout, ring in rings]

    def pace(self, layout: Layout, names: list[str], changed: Callable[[list[float]], object]) -> Pace:
        """What watches for stragglers among the ranks, which have `names`; `changed`: see `Pace`."""
        self._pace = Pace(layout, self._machine, self._checkpoint.config.num_layers, names, changed)
        self._progress.stragglers = self._pace.stragglers
        return self._pace

    def load_draft_model(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        """Load what `speculation.model` names, if anything, and see how fast it is."""
        if self._draft_memory is not None:
            vocab = self._checkpoint.config.vocab_size
            self._draft_model = DraftModel(self._draft_memory, layout, vocab, dtype, device)
            print(self._draft_model, flush=True)

    def controller(
        self,
        plans: list[RingPlan],
        tokens_in: Receiver,
        stop: Stop,
        timeline: Timeline,
        startup: Startup,
        world: World,
        group: dist.ProcessGroup | None,
    ) -> Controller:
        """Open the workload and start reading. `startup` has the steps so far.

        Where there are several `plans`, the first ranks of the other rings are served from now on, over `group`.
        """
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
        layouts = [plan.layout for plan in plans]
        pages, page_size = min(each.main_pages + each.swap_pages for each in layouts), layouts[0].page_size
        items = (within_memory(within_rope(item, switch), pages, page_size) for item in self._counted(requests))
        continued, record = self._unfinished.continued, self._recorder.put
        # Who is admitted when must not depend on the speed of reading where equal plans are to make equal visits.
        alone = len(plans) == 1
        until = None if self._config.pipeline.tune or not alone else lambda: stop.reason is not None
        concurrency = sum(each.concurrency for each in layouts)
        self._ahead = ReadAhead(items, done, continued, record, max(AHEAD, 2 * concurrency), until)
        make_head = partial(Head, self._config, self._checkpoint, self._tokenizer, plans[0], self._draft_model)
        if alone:
            self.head = make_head(self._ahead)
            self._watch(layouts, timeline)
            self._ahead.wait(concurrency)
            return self.head.controller(tokens_in, self._recorder, self._progress, stop, timeline)
        grouped = self._config.workload.order == "auto" and self._config.kvcache.share_prefixes
        if grouped:  # of few requests most share with none, and each ring would begin with some of every prefix
            begin = time.monotonic()
            self._ahead.wait(AHEAD, lambda: time.monotonic() > begin + LOOK_S)
        self._ahead.wait(concurrency)
        rates = [each.predicted for each in layouts]
        self._dispatcher = Dispatcher(
            self._ahead,
            self._recorder,
            self._progress,
            [rate or 1.0 for rate in rates] if None not in rates else [1.0] * len(rates),
            page_size,
            grouped,
        )
        for number in range(1, len(plans)):
            rank = number * (world.size // len(plans))
            self._dispatcher.serve_over(world, number, rank, group)
        client = Client(partial(self._dispatcher.serve, 0), plans[0].most_requests, world.end_with)
        self.head = make_head(client)
        self._watch(layouts, timeline)
        return self.head.controller(tokens_in, client, client, stop, timeline)

    def _watch(self, layouts: list[Layout], timeline: Timeline) -> None:
        """Let progress look at rank 0's own ring, and Prometheus know what was planned for all."""
        self._progress.sampler = lambda: self.head.sample(self._ahead, timeline)
        rates = [each.predicted for each in layouts if each.predicted is not None]
        if self._exporter is not None and len(rates) == len(layouts):
            self._exporter.predicted = sum(rates)

    def close(self) -> None:
        """Wait for the other rings, and write what is left. The own ring has closed."""
        if self._dispatcher is not None:
            self._dispatcher.wait()
            self._recorder.close()

    def _counted(self, items: Iterator[Item]) -> Iterator[Item]:
        """As many of `items` as were counted at the start; what is appended meanwhile is for the next start."""
        yield from islice(items, self._count)
        self._changed = self._manifest.changed_file()

    def report(
        self,
        heads: list[dict[str, Any]],
        stages: list[dict[str, Any]],
        spans: list[list[list[Any]]],
        stopped: str | None,
    ) -> None:
        """Write `metrics.json`, `report.html` and, if `spans` of each rank were kept, the trace; say where all lies.

        `heads`: the report of each ring's first rank. Raises LastingError if not all requests were answered, although
        nothing stopped the job.
        """
        self._progress.close()
        if self._exporter is not None:
            self._exporter.close()
        size = len(stages) // len(heads)
        ranks = [[Span(*span) for span in rank] for rank in spans]
        if ranks:
            write_trace(self._folder / "trace.json", ranks)
            latency = self._config.network.latency_ms
            titles = [
                f"{self._checkpoint.name}, {size} ranks, {head['plan']['rounds']} rounds, links of {latency:g} ms"
                for head in heads
            ]
            firsts = [*range(0, len(ranks), size)]
            rings = [(ranks[first:][:size], title) for first, title in zip(firsts, titles, strict=True)]
            draw_timelines(self._folder / "timeline.png", rings, firsts)
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
            "stragglers": "" if self._pace is None else self._pace.closing([stage["compute_s"] for stage in stages]),
            **in_sum(heads),
            "config": as_dict(self._config),
        }
        metrics["plan"]["predicted_for_these_answers"] = self._hindsight() if len(heads) == 1 else None
        if self._dispatcher is not None:
            elapsed = max(metrics["elapsed_s"], 1e-9)
            metrics["rings"] = [
                {
                    **ledger.totals,
                    "output_tokens_per_s": ledger.totals["output_tokens"] / elapsed,
                    "ranks": [*range(number * size, (number + 1) * size)],
                    **head,
                }
                for number, (ledger, head) in enumerate(zip(self._dispatcher.ledgers, heads, strict=True))
            ]
        write_metrics(self._folder / "metrics.json", metrics)
        print(closing_table(metrics))
        print(f"results in {self._writer.path}, and what the run did in {self._write_page(metrics, ranks)}", flush=True)
        if stopped is None:
            self._check_whole(metrics["requests"])

    def _write_page(self, metrics: dict[str, Any], ranks: list[list[Span]]) -> Path:
        """Where the run can be read about: the page, or metrics.json where there is no room for it."""
        page = self._folder / "report.html"
        try:
            write_page(page, metrics, ranks)
        except OSError as error:
            print(f"deserve: {page} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
            return self._folder / "metrics.json"
        return page

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

    def _hindsight(self) -> float | None:
        """Output tokens/s that the layout would have promised, had the lengths of the answers been known."""
        layout, machine = self.head.plan.layout, self.head.plan.machine
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
        return simulate(layout, lengths, machine, self._checkpoint.config.num_layers).tokens_per_s


def in_sum(heads: list[dict[str, Any]]) -> dict[str, Any]:
    """The reports of all rings as one: the first one's where only each has its own."""
    if len(heads) == 1:
        return heads[0]
    pressures = [head["memory_pressure"] for head in heads]
    rates = [head["plan"]["predicted_output_tokens_per_s"] for head in heads]
    predicted = None if None in rates else sum(rates)
    return {
        **heads[0],
        "memory_pressure": {key: sum(each[key] for each in pressures) for key in pressures[0]},
        "plan": {**heads[0]["plan"], "replicas": len(heads), "predicted_output_tokens_per_s": predicted},
    }


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
