"""Measures what a plan needs to know, on all ranks at once, before any weights are loaded.

Stages are timed in the loop of a run: there, frames, the threads that carry them, scheduling and the other ranks of a
host use the same cores and caches.
"""

import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from timeit import repeat, timeit
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter

from deserve import __version__
from deserve.batch import Completion, IntArray, Request, VisitPlan, VisitResult
from deserve.comm.coding import coded_bytes
from deserve.comm.gloo import GlooReceiver, GlooSender
from deserve.comm.link import Receiver
from deserve.comm.network import far_links, is_simulated
from deserve.comm.ring import connect, nccl_edges
from deserve.comm.world import World
from deserve.config import Config, NetworkSection
from deserve.layout import Layout, Shard, token_budgets
from deserve.memory import available_memory
from deserve.model.admissions import encode_sampling
from deserve.model.checkpoint import Checkpoint
from deserve.model.graphs import MOST_ROWS, graph_tokens
from deserve.model.tools import Answer
from deserve.model.weights import layer_kinds, parameter_bytes
from deserve.pipeline import run_pipeline
from deserve.planner.simulator import Requests
from deserve.planner.times import POWERS, Cost, Curve, LinkTimes, Machine, StageTimes, VisitLoad
from deserve.report.files import replace_file
from deserve.report.results import ResultsWriter
from deserve.scheduler.scheduler import Scheduler
from deserve.stage import Stage, load_stage
from deserve.timeline import Timeline
from deserve.workload import default_sampling

COLD_BYTES = 48 << 20  # weights or KV pages that pass through a core's cache between two visits of the same shape
LARGE_LAYER = 4 << 30  # bytes; experts of such a size may leave a GPU no room for four layers
# On a CPU and on a GPU. What a GPU's rows cost beside their keys and values hides behind these, if they are many.
CONTEXT = 16, 128  # tokens before a decode row in most visits
LONG_CONTEXT = 256, 384
FAR = 64, 256  # rows with such contexts
ANSWER = 63  # tokens
WRITTEN = 8  # lines of results
LONGEST_S = 1.0  # after this, every shape is visited no more often than it must be
FEWEST, MOST = 2, 5  # visits of each shape; the first does not count, on a GPU whose clock settles the second neither
PINGS, PONGS = 11, 12  # message tags
LARGE_FRAME = 1 << 20  # bytes
BUS_BYTES = 64 << 20
BACK_BYTES = BUS_BYTES // 32  # a decode row brings in all of its context and saves one token
MOST_KEPT = 4  # surveys of rings of different sizes
TRANSFERS = 4  # of a link or the bus; the quickest counts
RING_VISITS = 24  # after which each one follows on the last as in a run
TAKES, IN_A_ROW = 3, 6  # of each shape, and visits in each take
BUSY_GEMMS = 16  # of 8192 x 8192: 20 ms, in which a host launches that many visits
# Of a GPU: activations and logits of a visit, workspaces of kernels, NCCL's buffers, and what the allocator wastes.
RESERVE_BYTES = 2_500_000_000
STAGES = TypeAdapter(list[tuple[StageTimes, int]])  # and the bytes of a layer's graphs, of each rank


def survey(
    world: World,
    config: Config,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    kept: Path | None = None,
) -> Machine | None:
    """Measure all ranks and links: the machine on rank 0, None on the others. Every rank calls it.

    Rank 0 writes the times of the stages to `kept`, and takes them from there if they are of the same hardware, layout,
    model and versions. The file keeps those of a few rings, as hosts may leave and come back. Memory and links are
    measured anew.
    """
    free_cached(device)
    host_memory = available_memory() // 2 // world.local_size
    memory = torch.cuda.mem_get_info(device)[0] - RESERVE_BYTES if device.type == "cuda" else host_memory
    edges = nccl_edges(world, config, device)
    budgets = token_budgets(config.pipeline.max_batch_tokens, device.type == "cuda")
    page_bytes = config.kvcache.page_size * checkpoint.config.kv_spec(dtype, config.kvcache.fp8).token_bytes
    kinds = list(layer_kinds(checkpoint.config, dtype))
    link = replace(measure_link(world), far=far_links(NetworkSection(), world.hosts)[world.rank])
    if edges[world.rank] is not None and not link.far:
        link = replace(link, byte_s=0.0)  # NCCL within a host: copies hide behind the visits
    key = {
        "versions": [__version__, torch.__version__],
        "hardware": world.gather("survey/hardware", hardware(device)),
        "hosts": [world.hosts.index(host) for host in world.hosts],
        "model": [json.loads(json.dumps(asdict(checkpoint.config), default=str)), str(dtype), kinds],
        "settings": [
            config.kvcache.page_size,
            list(budgets),
            config.comm.backend,
            config.comm.activations,
            config.kvcache.dtype,
        ],
    }
    known = world.share("survey/kept", read_kept(kept, key) if world.rank == 0 else None)
    if known is None:
        probe = Probe(world, config, checkpoint, dtype, device, budgets[-1])
        stage = replace(probe.times(link.latency_s), page_s=page_bytes * measure_bus(device))
        if world.rank == 0:
            stage = replace(stage, request_s=measure_requests(config.kvcache.page_size))
        own = [asdict(stage), probe.graph_bytes]
        del probe
        free_cached(device)
        known = world.gather("survey/stages", own)
    if kept is not None and world.rank == 0:
        others = [other for other in read_surveys(kept) if other["key"] != key]
        write_surveys(kept, [{"key": key, "stages": known}, *others][:MOST_KEPT])
    found = world.gather("survey", [list(astuple(link)), memory, host_memory])
    if not found:
        return None
    links, memories, host_memories = zip(*found, strict=True)
    stages, graphs = zip(*STAGES.validate_python(known), strict=True)
    # Processors of one name on two hosts may be used by others differently, those of one host share what is to be had.
    processors = [
        str(part if device.type == "cuda" else (part, world.hosts[rank])) for rank, part in enumerate(key["hardware"])
    ]
    return Machine(
        stages=alike(stages, processors),
        links=over([LinkTimes(*each) for each in links], config.network),
        memory=memories,
        host_memory=min(host_memories),
        hidden_bytes=checkpoint.config.hidden_size * dtype.itemsize,
        page_bytes=page_bytes,
        graph_bytes=max(graphs),
        receives_on_device=any(edges),
        budgets=budgets,
        coded_bytes=coded_bytes(checkpoint.config.hidden_size),
        coded=config.comm.activations == "fp8",
        window=checkpoint.config.window,
        kinds=tuple(kinds),
    )


def free_cached(device: torch.device) -> None:
    """Give back the device memory that tensors no longer use."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def hardware(device: torch.device) -> list[Any]:
    """What the times of a stage depend on: the processor and the threads that compute."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return [*models[:1], os.cpu_count(), torch.get_num_threads()]


def read_kept(kept: Path | None, key: dict[str, Any]) -> list[Any] | None:
    """The stages that an earlier start has left in `kept`, if they are those of `key`."""
    surveys = [] if kept is None else read_surveys(kept)
    return next((list(found["stages"]) for found in surveys if found["key"] == key), None)


def read_surveys(kept: Path) -> list[dict[str, Any]]:
    """The surveys in `kept`, the last one first: `key` and `stages` of each."""
    try:
        return [{"key": survey["key"], "stages": survey["stages"]} for survey in json.loads(kept.read_text())]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut short
        return []


def write_surveys(kept: Path, surveys: list[dict[str, Any]]) -> None:
    """Keep `surveys`, that of this start first."""
    with suppress(OSError):  # it would only have saved time
        replace_file(kept, json.dumps(surveys).encode() + b"\n")


def keep_pace(kept: Path, slow: Sequence[float]) -> None:
    """Note in `kept` how many times slower than surveyed this start has found each rank: the next one plans for it."""
    surveys = read_surveys(kept)
    if surveys and len(surveys[0]["stages"]) == len(slow):
        for (times, _), factor in zip(surveys[0]["stages"], slow, strict=True):
            times["slow"] = factor
        write_surveys(kept, surveys)


def alike(stages: Sequence[StageTimes], kinds: Sequence[str]) -> tuple[StageTimes, ...]:
    """`stages`, where ranks of one of `kinds` are equally fast: as fast as the fastest of them was measured to be."""
    visit = VisitLoad(decodes=64, decode_kv=64 * CONTEXT[0])
    pairs = [*zip(stages, kinds, strict=True)]
    fastest = {
        kind: min(
            (stage for stage, other in pairs if other == kind),
            key=lambda stage: stage.layers_s(visit, [1] * len(stage.layers)),
        )
        for kind in kinds
    }
    return tuple(replace(stage, layers=fastest[kind].layers, visit=fastest[kind].visit) for stage, kind in pairs)


def over(links: Sequence[LinkTimes], network: NetworkSection) -> tuple[LinkTimes, ...]:
    """A ring's `links` with the simulated network on top; a ring of one has none to simulate."""
    if len(links) == 1:
        return tuple(links)
    byte_s = 0.0 if network.bandwidth_mbps is None else 8e-6 / network.bandwidth_mbps
    latency_s = network.latency_ms / 1e3
    return tuple(
        LinkTimes(link.latency_s + latency_s, max(link.byte_s, byte_s), link.far or is_simulated(network))
        for link in links
    )


def measure_link(world: World) -> LinkTimes:
    """The link to the next rank, by a few round trips. All links are measured at once, as all carry traffic at once."""
    if world.size == 1:
        return LinkTimes()
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    pings_in, pongs_in = (
        GlooReceiver(peer, tag, LARGE_FRAME, ahead=6) for peer, tag in ((before, PINGS), (after, PONGS))
    )
    pings, pongs = GlooSender(after, PINGS, 8), GlooSender(before, PONGS, 8)
    small, large = torch.empty(0, dtype=torch.uint8), torch.zeros(LARGE_FRAME, dtype=torch.uint8)

    def round_trip(payload: torch.Tensor) -> None:
        pings.send(payload)
        pings_in.receive()
        pongs.send(small)
        pongs_in.receive()

    round_trip(large)  # opens the connections and their windows
    small_s = min(repeat(lambda: round_trip(small), number=1, repeat=4))
    large_s = timeit(lambda: round_trip(large), number=1)
    pings.close()
    pongs.close()
    return LinkTimes(small_s / 2, max(0.0, large_s - small_s) / LARGE_FRAME)


def measure_bus(device: torch.device) -> float:
    """Seconds per byte from host memory to the device, while a little goes the other way: what is new in pages."""
    cuda = device.type == "cuda"
    near = torch.empty(2, BUS_BYTES, dtype=torch.uint8, device=device)
    far = torch.zeros(2, BUS_BYTES, dtype=torch.uint8, pin_memory=cuda)
    back = torch.cuda.Stream(device) if cuda else None

    def transfer() -> None:
        if back is not None:
            with torch.cuda.stream(back):
                far[1, :BACK_BYTES].copy_(near[1, :BACK_BYTES], non_blocking=True)
        near[0].copy_(far[0], non_blocking=True)
        if cuda:
            torch.cuda.synchronize(device)

    return min(repeat(transfer, number=1, repeat=TRANSFERS)) / BUS_BYTES


def measure_requests(page_size: int) -> float:
    """Seconds that rank 0 spends on a request beside its visits: admission, completion, and its line of results."""
    rows, tokens = 64, np.arange(ANSWER, dtype=np.int32)
    # With collections of garbage, which timeit would leave out
    all_new = statistics.median(repeat(scheduling(rows, page_size, answer=1), gc.enable, number=1, repeat=9))
    answer = Completion(Request("0", tokens), tokens, "length"), Answer(" ".join(map(str, tokens.tolist())))
    with tempfile.TemporaryDirectory() as folder, ResultsWriter(Path(folder) / "results", False, "") as writer:
        return all_new / rows + timeit(lambda: writer.completion(*answer), gc.enable, number=WRITTEN) / WRITTEN


def scheduling(rows: int, page_size: int, answer: int = ANSWER) -> Callable[[], None]:
    """What the scheduler does for a visit of `rows` sequences that end after `answer` tokens, again and again."""
    pages = rows * (ANSWER // page_size + 2)
    layout = Layout((0,), 1, rows, rows, rows, "prefill_first", page_size, pages, 0, 0)
    scheduler = Scheduler(layout, Requests([(1, answer)] * (rows * (MOST + 20))))

    def visit() -> None:
        scheduler.commit(0, VisitResult(np.zeros(scheduler.awaited(0), np.int32)))
        VisitPlan.decode(scheduler.plan(0)[0].encode())

    visit()
    return visit


@dataclass(frozen=True)
class Shape:
    """A visit to time: new tokens of each row, and the context of all. `sampled`: whether each row is."""

    new: tuple[int, ...]
    context: int = 0
    sampled: bool = False


@dataclass(frozen=True)
class Visited:
    """Seconds of the visits of one shape in the loop: computing, the host beside that, and planning on rank 0."""

    compute: float
    host: float
    plan: float
    apart: float  # from the beginning of one visit to that of the next


class Probe:
    """Stages of random weights: `short` of one layer with embedding and head, `long` of several layers of a kind alone.

    The difference of the two is the layers, and what remains of `short` is what every visit costs. The latter is taken
    off `long` stages of other kinds of layers.
    """

    def __init__(
        self,
        world: World,
        config: Config,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
    ):
        self._world, self._config, self._device = world, config, device
        self._gpu = device.type == "cuda"
        model, self._page_size = checkpoint.config, config.kvcache.page_size
        self._max_tokens = max_tokens
        kinds = layer_kinds(model, dtype)
        self._firsts = [kinds.index(kind) for kind in range(max(kinds) + 1)]
        counts = graph_tokens(max_tokens, torch.cuda.get_device_name(device)) if self._gpu else []
        self._steps = [count for count in counts if count > MOST_ROWS]
        # Two rows may cost far more than one: products of matrices, no longer with a vector.
        # More and more experts are read, up to all of them.
        sizes = POWERS if model.experts else (1, 2, 16, 64, 256, 512)
        self._sizes = sorted({size for size in sizes if size < max_tokens} | {max_tokens})
        self._counts = sorted({*self._sizes, *self._steps})
        near = min(CONTEXT[self._gpu], model.max_context // 4)
        far = min(LONG_CONTEXT[self._gpu], model.max_context // 2)
        self._decodes = {size: Shape((1,) * size, near) for size in self._sizes}
        rows = min(FAR[self._gpu], max_tokens)
        self._far, self._near = Shape((1,) * rows, far), Shape((1,) * rows, near)
        self._prompts = {count: Shape(pieces(count, min(64, model.max_context))) for count in self._counts}
        self._long_prompt = Shape((min(max_tokens, model.max_context),))
        half = min(64, max_tokens // 2)
        self._mixed = Shape((1,) * half + (half,), near)
        bare = [*self._prompts.values(), self._long_prompt, *self._decodes.values(), self._far, self._near]
        self._bare = list(dict.fromkeys([*bare, self._mixed] if half > 1 else bare))
        self._heads = [replace(shape, sampled=True) for shape in self._decodes.values()]
        self._next_slot = self._next_page = 0
        self._page_writes: list[IntArray] = []
        self._entries = {shape: self._entry(shape) for shape in [*self._bare, *self._heads]}
        self._loads = {shape: VisitLoad.of(plan, model.window) for shape, plan in self._entries.items()}
        pages = max(
            self._next_page, COLD_BYTES // (self._page_size * model.kv_spec(dtype, config.kvcache.fp8).token_bytes) + 1
        )
        layout = Layout((0,), 1, max_tokens, self._next_slot, max_tokens, "vanilla", self._page_size, pages, 0, 0)
        layout = replace(layout, fp8_pages=config.kvcache.fp8)
        dummy = replace(checkpoint, weights="dummy")
        self._checkpoint, self._layout, self._dtype = dummy, layout, dtype
        self._hidden = torch.randn(max_tokens, model.hidden_size, device=device, dtype=dtype)
        self._ids = torch.from_numpy(np.arange(max_tokens, dtype=np.int32) % model.vocab_size)
        sampling = default_sampling(config.sampling, checkpoint.generation)
        admissions = [encode_sampling(slot, sampling) for slot in range(self._next_slot)]
        self._entry_plan = VisitPlan(0, page_writes=np.concatenate(self._page_writes), admissions=admissions)
        self.graph_bytes = 0  # of device memory for the graphs of one layer; a little of it is not the layers'
        self._short, _ = self._load(self._firsts[0], short=True)

    def _load(self, first: int, short: bool = False) -> tuple[Stage, int]:
        """A stage of layers of the kind of `first`, and how many they are."""
        model = self._checkpoint.config
        layer_bytes = parameter_bytes(model, Shard(first, first + 1, False, False), self._dtype)
        fewest = 2 if layer_bytes > LARGE_LAYER else 3
        layers = 1 if short else min(model.num_layers, max(fewest, -(-COLD_BYTES // layer_bytes)))
        checkpoint = replace(self._checkpoint, config=model.repeated(first, layers))
        stage = load_stage(checkpoint, self._layout, Shard(0, layers, short, short), self._dtype, self._device)
        if not self._gpu:
            stage.touch()
        stage.forward(self._entry_plan, self._ids[:0])
        return stage, layers

    def times(self, latency_s: float) -> StageTimes:
        """Time visits that differ in one thing at a time, and tell from them what each thing costs.

        Every rank calls it. The links have `latency_s` one way, so that more rounds must circulate.
        """
        size = self._world.size
        rounds = self._world.share("survey/rounds", size + 2 + min(64, int(size * latency_s / 2e-3)))
        short = self._timed(self._short, [*self._bare, *self._heads], rounds)
        rest: dict[Shape, float] = {}
        costs: list[Cost] = []
        for first in self._firsts:
            stage, layers = self._load(first)
            long = self._timed(stage, self._bare, rounds)
            layer: dict[Shape, float] = {}
            for shape in self._bare:
                one, several = short[shape].compute, long[shape].compute
                if first == self._firsts[0]:
                    layer[shape] = max(0.0, (several - one) / (layers - 1)) if layers > 1 else one
                    rest[shape] = max(0.0, one - layer[shape])
                else:
                    layer[shape] = max(0.0, several - rest[shape]) / layers
            costs.append(self._cost(layer, bool(self._checkpoint.config.sliding(first, first + 1))))
            self.graph_bytes = max(self.graph_bytes, stage.graph_bytes // layers)
            del stage
            free_cached(self._device)
        head = [(0.0, 0.0)]
        for shape in self._heads:
            bare = replace(shape, sampled=False)
            head.append((len(shape.new), max(0.0, short[shape].compute - short[bare].compute)))
        host = [(rows, min(short[shape].host, long[shape].host)) for rows, shape in self._decodes.items()]
        plan = [(rows, min(short[shape].plan, long[shape].plan)) for rows, shape in self._decodes.items()]
        # As many rounds as ranks: every rank is idle until its next visit arrives.
        # On a GPU the first visits begin while others are still being launched.
        ring = self._timed(self._short, [self._near] * (RING_VISITS if self._gpu else 1), size)[self._near]
        begins_s = ring.apart - ring.compute - (0.0 if self._gpu else ring.host)
        return StageTimes(
            layers=tuple(costs),
            visit=self._cost(rest),
            head=Curve.through(head),
            plan=Curve.through(plan) if self._world.rank == 0 else Curve(),
            host=Curve.through(host),
            ahead=self._gpu,
            start_s=max(0.0, self._world.share("survey/start", begins_s - ring.plan / size) - latency_s),
        )

    def _timed(self, stage: Stage, shapes: Sequence[Shape], rounds: int) -> dict[Shape, Visited]:
        """Seconds of visits of `shapes` in the loop. A GPU's own are told apart from it.

        Visits of a few layers are so short that in the loop a GPU waits for its host, which those of a run hide.
        """
        visited = self._loop(stage, shapes, rounds)
        if not self._gpu:
            return visited
        device = self._on_device(stage, list(dict.fromkeys(shapes)))
        return {shape: replace(visited[shape], compute=device[shape]) for shape in shapes}

    @torch.inference_mode()
    def _on_device(self, stage: Stage, shapes: Sequence[Shape]) -> dict[Shape, float]:
        """Seconds of the device for a visit of each of `shapes`, medians of some takes.

        Each take is a row of visits behind GEMMs that keep the device busy until the host has launched all of them. So
        the device's clock is that of a GPU at work, too.
        """
        takes: dict[Shape, list[float]] = {shape: [] for shape in shapes}
        matrix = torch.randn(8192, 8192, dtype=self._hidden.dtype, device=self._device)
        for shape in [shape for _ in range(TAKES) for shape in shapes]:
            for _ in range(BUSY_GEMMS):
                matrix @ matrix  # its result does not matter
            plan = self._entries[shape]
            x = (self._ids if stage is self._short else self._hidden)[: plan.tokens]
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(IN_A_ROW):
                stage.forward(plan, x)
            last.record()
            last.synchronize()
            takes[shape].append(first.elapsed_time(last) / 1e3 / IN_A_ROW)
        return {shape: statistics.median(took) for shape, took in takes.items()}

    def _cost(self, seconds: dict[Shape, float], windowed: bool = False) -> Cost:
        """The cost of visits that took `seconds`."""
        attended = {shape: Cost(windowed=windowed).attended(self._loads[shape]) for shape in seconds}
        kv, pairs = ({shape: each[part] for shape, each in attended.items()} for part in (0, 1))
        whole, long = self._prompts[self._max_tokens], self._long_prompt
        more_pairs = pairs[long] - pairs[whole]
        comparable = sum(long.new) == self._max_tokens and more_pairs > 0
        pair_s = max(0.0, (seconds[long] - seconds[whole]) / more_pairs) if comparable else 0.0
        more_kv = kv[self._far] - kv[self._near]
        kv_s = max(0.0, (seconds[self._far] - seconds[self._near]) / more_kv) if more_kv else 0.0
        tokens = {count: max(0.0, seconds[shape] - pair_s * pairs[shape]) for count, shape in self._prompts.items()}
        decodes = [(size, seconds[shape] - tokens[size] - kv_s * kv[shape]) for size, shape in self._decodes.items()]
        cost = Cost(stepped(tokens, self._steps), Curve.through(decodes), kv_s, pair_s, windowed=windowed)
        if self._mixed not in seconds:
            return cost
        return replace(cost, mixed_s=max(0.0, seconds[self._mixed] - cost(self._loads[self._mixed])))

    def _loop(self, stage: Stage, shapes: Sequence[Shape], rounds: int) -> dict[Shape, Visited]:
        """Take `stage` through visits of `shapes`, one after the other and several times, in the loop of a run."""
        world, most = self._world, self._max_tokens
        layout = Layout((0,), rounds, most, rounds * most, most, "vanilla", self._page_size, 8 * most, 0, 0)
        plain = replace(self._config, network=NetworkSection())
        hidden = self._hidden.shape[1]
        links = connect(world, plain, layout, hidden, self._hidden.dtype, self._device)
        timeline = Timeline(keep=True, device=self._device)
        script = None
        if links.tokens_in is not None:
            script = _Script(self._takes(shapes), self._ids, rounds, links.tokens_in, timeline)
        actor = _Actor(stage, self._ids if stage is self._short else self._hidden, self._hidden, world.is_last)
        run_pipeline(cast(Stage, actor), links, script, rounds, hidden, timeline)
        return self._visited(shapes, timeline, actor.began)

    def _visited(self, shapes: Sequence[Shape], timeline: Timeline, began: list[int]) -> dict[Shape, Visited]:
        """What the spans of a loop that visited `shapes` in turn say of each. `began`: when each visit did (ns)."""
        count = len(began) - 1  # the last are empty
        beside, plan = np.zeros(count), np.zeros(count)
        compute = [span.end - span.begin for span in timeline.spans if span.kind == "compute"][:count]
        for span in timeline.spans:
            index = bisect_right(began, span.begin) - 1
            if span.kind in ("receive", "plan") and 0 <= index < count:
                beside[index] += span.end - span.begin
        plans = [span.end - span.begin for span in timeline.spans if span.kind == "plan"][:count]
        plan[: len(plans)] = plans
        apart = np.diff(began[: count + 1])
        host = apart - beside - (0 if self._gpu else np.array(compute))
        seconds = np.stack([compute, host, plan, apart])[:, : count // len(shapes) * len(shapes)] / 1e9
        takes = seconds.reshape(4, -1, len(shapes))[:, 1 + self._gpu :]
        low, usual = takes.min(1), np.median(takes, 1)
        # Differences can be taken of the least of each. The whole, though, takes as long as it usually does.
        low[0] *= usual[0].sum() / low[0].sum()
        low[3] = usual[3]
        return {shape: Visited(*values) for shape, values in zip(shapes, np.maximum(low, 0).T.tolist(), strict=True)}

    def _entry(self, shape: Shape) -> VisitPlan:
        """The visit of `shape`, on slots and pages of its own."""
        rows = len(shape.new)
        width = -(-(max(shape.new) + shape.context) // self._page_size)
        slots = np.arange(self._next_slot, self._next_slot + rows, dtype=np.int32)
        index = np.arange(rows * width)
        pages = self._next_page + index
        self._page_writes.append(np.stack([slots[index // width], index % width, pages], 1).astype(np.int32))
        self._next_slot, self._next_page = self._next_slot + rows, self._next_page + rows * width
        return VisitPlan(
            0,
            slots=slots,
            new_tokens=np.array(shape.new, np.int32),
            context=np.full(rows, shape.context, np.int32),
            samples=np.full(rows, shape.sampled, np.int32),
        )

    def _takes(self, shapes: Sequence[Shape]) -> Iterator[tuple[VisitPlan, Callable[[], None]]]:
        """Visits of `shapes` in turn, and what rank 0 has to do to plan one like each.

        Some takes of all of them, and further ones for `LONGEST_S` at most.
        """
        decodes = [bool(shape.context) and set(shape.new) == {1} for shape in shapes]
        steps = [
            (self._entries[shape], scheduling(len(shape.new), self._page_size) if decode else lambda: None)
            for shape, decode in zip(shapes, decodes, strict=True)
        ]
        deadline = time.monotonic() + LONGEST_S
        for taken in range(MOST):
            if taken >= FEWEST + self._gpu and time.monotonic() > deadline:
                return
            yield from steps


class _Actor:
    """Plays a stage: one of a probe computes, whatever comes in, with the same input every time."""

    def __init__(self, stage: Stage, x: torch.Tensor, hidden: torch.Tensor, last: bool):
        self.dtype = hidden.dtype
        self._stage, self._x, self._hidden, self._last = stage, x, hidden, last
        self.began: list[int] = []  # each visit, and the first of the empty ones (ns)
        self._ended = False

    def forward(self, plan: VisitPlan, x: torch.Tensor, timeline: Timeline) -> torch.Tensor:
        if not self._ended:
            self.began.append(time.monotonic_ns())
        self._ended |= plan.retires
        if not plan.rows:
            return torch.empty(0, dtype=torch.int32)
        if self._last or not plan.sampled:
            y = self._stage.forward(plan, self._x[: plan.tokens])
            if plan.sampled:
                return y
        return torch.empty(0, dtype=torch.int32) if self._last else self._hidden[: plan.tokens]

    def end_visit(self, following: int | None, timeline: Timeline) -> None:
        """It has no swap pages."""


class _Script:
    """Rank 0's half of the loop: `steps`, each a visit and what it takes to plan it, and then empty visits."""

    def __init__(
        self,
        steps: Iterator[tuple[VisitPlan, Callable[[], None]]],
        ids: torch.Tensor,
        rounds: int,
        tokens_in: Receiver,
        timeline: Timeline,
    ):
        self._steps, self._ids, self._rounds = steps, ids.numpy(), rounds
        self._tokens_in, self._timeline = tokens_in, timeline
        self._under_way = 0

    def next_visit(self, micro_batch: int) -> tuple[VisitPlan, IntArray]:
        if self._under_way == self._rounds:
            self._collect()
        plan, schedule = next(self._steps, (VisitPlan(0, retires=True), lambda: None))
        with self._timeline.span("plan", micro_batch):
            schedule()
        self._tokens_in.expect()
        self._under_way += 1
        return replace(plan, micro_batch=micro_batch), self._ids[: plan.tokens]

    def _collect(self) -> None:
        self._timeline.receive(self._tokens_in, 0)
        self._under_way -= 1

    def close(self) -> None:
        while self._under_way:
            self._collect()


def pieces(tokens: int, length: int) -> tuple[int, ...]:
    """`tokens` tokens as rows of `length` each."""
    whole, rest = divmod(tokens, length)
    return (length,) * whole + ((rest,) if rest else ())


def stepped(seconds: dict[int, float], steps: Container[int]) -> Curve:
    """The curve of `seconds` by count. A GPU's larger visits are padded: counts up to one of `steps` take as long."""
    points = [
        (before + 1, seconds[step])
        for before, step in itertools.pairwise(sorted(seconds))
        if step in steps and before + 1 < step
    ]
    return Curve.through(sorted([*seconds.items(), *points]))
