"""Measures what a plan needs to know: stages before their weights are loaded, links before they carry anything."""

import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from deserve.batch import Completion, IntArray, Request, SamplingParams, VisitPlan, VisitResult
from deserve.comm.gloo import GlooReceiver, GlooSender
from deserve.comm.ring import nccl_edges
from deserve.comm.world import World
from deserve.config import Config, NetworkSection
from deserve.model.checkpoint import Checkpoint
from deserve.model.graphs import MOST_ROWS, graph_tokens
from deserve.model.sampler import encode_sampling
from deserve.model.tools import Answer
from deserve.model.weights import Shard, parameter_bytes
from deserve.planner.memory import available_memory
from deserve.planner.plan import Plan, token_budgets
from deserve.planner.rehearsal import Alike, Scene, rehearse, rehearse_start
from deserve.planner.times import Cost, Curve, LinkTimes, Machine, StageTimes, Work
from deserve.report.results import ResultsWriter
from deserve.scheduler.scheduler import Scheduler
from deserve.stage import Stage, load_stage
from deserve.workload import default_sampling

COLD_BYTES = 48 << 20  # weights or KV pages that pass through a core's cache between two visits of the same
# On a CPU and on a GPU. What a GPU's rows cost each beside their keys and values hides behind these, if they are many.
CONTEXT = 16, 128  # tokens before a decode row in most measurements
LONG_CONTEXT = 256, 384
FAR = 64, 256  # rows with such contexts
ANSWER = 63  # tokens
WRITTEN = 8  # lines of results: a few kilobytes, as nobody has asked for them
PINGS, PONGS = 11, 12  # message tags of the link measurement
LONGEST_S = 1.0  # after this a stage is measured no more often than it must
FEWEST = 2, 4  # takes of each visit on a CPU and on a GPU, whose clock settles during the first
LARGE_FRAME = 1 << 20  # bytes
BUS_BYTES = 64 << 20
BACK_BYTES = BUS_BYTES // 32  # a decode row brings in all of its context and saves one token
TRANSFERS = 4  # of a link or the bus; the quickest counts
# Of a GPU: activations and logits of a visit, workspaces of kernels, NCCL's buffers, and what the allocator wastes.
RESERVE_BYTES = 2_500_000_000
IN_A_ROW = 4  # visits that a device is given at once, so that it computes without a pause
BUSY_S = 0.02  # a device's work before that: longer than the host takes to launch these
BUSY_SIDE = 4096  # of the matrices that it multiplies and copies meanwhile
LASTING_S = 1.0  # of visits that follow each other, until a device's clock is what its power allows for long
LASTING_ROW_S = 0.2  # of them in a row
LASTING_TOKENS = 512

Visit: TypeAlias = tuple[tuple[int, ...], int]  # new tokens of each row, context of all
Shape: TypeAlias = tuple[bool, Visit, int]  # whether of the long stage, the visit, rows that are sampled


def survey(
    world: World, config: Config, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> Machine | None:
    """Measure all ranks and links: the machine on rank 0, None on the others. Every rank calls it.

    On a CPU the ranks of a host share its memory and cores, so all of them measure at the same time.
    """
    if device.type == "cuda":  # what an earlier job of this process has left
        gc.collect()
        torch.cuda.empty_cache()
    memory = usable_memory(world, device)
    host_memory = available_memory() // 2 // world.local_size
    edges = nccl_edges(world, config, device)
    page_size = config.kvcache.page_size
    budgets = token_budgets(config.pipeline.max_batch_tokens, device.type == "cuda")
    most = budgets[-1]
    probe = _Probe(checkpoint, dtype, device, page_size, most, default_sampling(config.sampling, checkpoint.generation))
    world.share("survey/go", bool(world.gather("survey/ready", None)))  # all start at once
    times = probe.times()
    link, frames = measure_link(world)
    if any(edges):
        byte_s = measure_nccl(world, edges, device)
        link = replace(link, byte_s=byte_s) if edges[world.rank] is not None else link
        comes, goes = (edges[world.rank - 1], world.rank > 0), (edges[world.rank], not world.is_last)
        if all(edge is not None for edge, exists in (comes, goes) if exists):  # no hidden states pass through the host
            frames = Curve(seconds=frames.seconds[:1])
    page_bytes = page_size * checkpoint.config.kv_spec(dtype).token_bytes
    planning = measure_scheduling(page_size, most) if world.rank == 0 else Curve()
    if device.type == "cpu":
        loop = rehearse(world, config, probe.forward, probe.scenes, link.latency_s)
        times, planning = times.scaled(loop.slowdown), loop.planning
        frames = replace(loop.rest, at=tuple(tokens * probe.hidden_bytes for tokens in loop.rest.at))
        if world.size == 1:  # no frames, but a loop all the same
            planning = replace(planning, seconds=tuple(map(sum, zip(planning.seconds, frames.seconds, strict=True))))
    else:
        scene = probe.scenes[-1]
        start_s = rehearse_start(world, config, probe.forward, scene, link.latency_s, device)
        times = replace(times, start_s=max(0.0, start_s - frames(scene.hidden.nbytes)))
    times = replace(
        times,
        frames=frames,
        plan=planning,
        request_s=measure_requests(page_size) if world.rank == 0 else 0.0,
        page_s=page_bytes * measure_bus(device),
    )
    graph_bytes = probe.graph_bytes
    del probe
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"rank {world.rank}"
    own = [times.to_json(), [link.latency_s, link.byte_s], memory, host_memory, graph_bytes, kind]
    found = world.gather("survey", own)
    if not found:
        return None
    stages, links, memories, host_memories, graphs, kinds = zip(*found, strict=True)
    return Machine(
        stages=alike([StageTimes.from_json(stage) for stage in stages], kinds),
        links=over([LinkTimes(*link) for link in links], config.network),
        memory=memories,
        host_memory=min(host_memories),
        hidden_bytes=checkpoint.config.hidden_size * dtype.itemsize,
        page_bytes=page_bytes,
        graph_bytes=max(graphs),
        receives_on_device=any(edges),
        budgets=budgets,
    )


def alike(stages: list[StageTimes], kinds: Sequence[str]) -> tuple[StageTimes, ...]:
    """`stages`, where ranks of one of `kinds` are equally fast: as fast as the fastest of them was measured to be."""
    visit = Work(decodes=64, decode_kv=64 * CONTEXT[0])
    best: dict[str, StageTimes] = {}
    for stage, kind in zip(stages, kinds, strict=True):
        if kind not in best or stage.layer(visit) < best[kind].layer(visit):
            best[kind] = stage
    return tuple(
        replace(best[kind], plan=stage.plan, request_s=stage.request_s, frames=stage.frames, page_s=stage.page_s)
        for stage, kind in zip(stages, kinds, strict=True)
    )


def usable_memory(world: World, device: torch.device) -> int:
    """Bytes that this rank may fill with weights and KV pages: what is free, less room for everything else."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - RESERVE_BYTES
    return available_memory() // 2 // world.local_size


def over(links: Sequence[LinkTimes], network: NetworkSection) -> tuple[LinkTimes, ...]:
    """A ring's `links` with the simulated network on top; a ring of one has none to simulate."""
    if len(links) == 1:
        return tuple(links)
    byte_s = 0.0 if network.bandwidth_mbps is None else 8e-6 / network.bandwidth_mbps
    latency_s = network.latency_ms / 1e3
    return tuple(LinkTimes(link.latency_s + latency_s, max(link.byte_s, byte_s)) for link in links)


def measure_link(world: World) -> tuple[LinkTimes, Curve]:
    """The link to the next rank, and the host's time for a visit's frames by their bytes.

    Takes four round trips. All links are measured at once, as all carry traffic at once. Host time is processor
    time, since on a real network most of the waiting is not the host's.
    """
    if world.size == 1:
        return LinkTimes(), Curve()
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    pings_in, pongs_in = (
        GlooReceiver(peer, tag, LARGE_FRAME, ahead=6) for peer, tag in ((before, PINGS), (after, PONGS))
    )
    pings, pongs = GlooSender(after, PINGS, 8), GlooSender(before, PONGS, 8)
    small, large = torch.empty(0, dtype=torch.uint8), torch.zeros(LARGE_FRAME, dtype=torch.uint8)

    def round_trip(payload: torch.Tensor) -> tuple[float, float]:
        begin, cpu = time.monotonic(), time.process_time()
        pings.send(payload)
        pings_in.receive()
        pongs.send(small)
        pongs_in.receive()
        return time.monotonic() - begin, time.process_time() - cpu

    round_trip(large)  # opens the connections and their windows
    trips = [round_trip(small) for _ in range(4)]
    large_s, large_cpu = round_trip(large)
    pings.close()
    pongs.close()
    small_s, small_cpu = (min(values) for values in zip(*trips, strict=True))
    byte_s = max(0.0, large_s - small_s) / LARGE_FRAME
    # Each trip is two frames out and two in, like a visit: a plan and hidden states.
    return LinkTimes(small_s / 2, byte_s), Curve((0.0, float(LARGE_FRAME)), (small_cpu, max(small_cpu, large_cpu)))


def measure_nccl(world: World, edges: list[dist.ProcessGroup | None], device: torch.device) -> float:
    """Seconds per byte of the NCCL link to the next rank; 0 where there is none. `edges`: see `World.nccl_edges`."""
    payload = torch.zeros(16 * LARGE_FRAME, dtype=torch.uint8, device=device)

    def took(move: Callable[..., dist.Work | None], peer: int, edge: dist.ProcessGroup) -> float:
        begin = time.perf_counter()
        work = move(payload, peer, group=edge)
        assert work is not None
        work.wait()
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    if world.rank and (edge := edges[world.rank - 1]) is not None:
        for _ in range(TRANSFERS):
            took(dist.irecv, world.rank - 1, edge)
    if (edge := edges[world.rank]) is None:
        return 0.0
    return min(took(dist.isend, world.rank + 1, edge) for _ in range(TRANSFERS)) / len(payload)


def measure_bus(device: torch.device) -> float:
    """Seconds per byte from host memory to the device, while a little goes the other way: what is new in pages."""
    near = torch.empty(2, BUS_BYTES, dtype=torch.uint8, device=device)
    far = torch.zeros(2, BUS_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    if device.type != "cuda":
        return _least(lambda: near[0].copy_(far[0])) / BUS_BYTES
    back = torch.cuda.Stream(device)

    def both() -> None:
        with torch.cuda.stream(back):
            far[1, :BACK_BYTES].copy_(near[1, :BACK_BYTES], non_blocking=True)
        near[0].copy_(far[0], non_blocking=True)
        torch.cuda.synchronize(device)

    return _least(both) / BUS_BYTES


def _least(action: Callable[[], object]) -> float:
    """Seconds of `action`, the least of a few."""
    times = []
    for _ in range(TRANSFERS):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


class _Probe:
    """Two stages of random weights: `short` of one layer with embedding and head, `long` of several layers alone.

    Their difference is the layers, and what remains of `short` is what every visit costs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int,
        max_tokens: int,
        sampling: SamplingParams,
    ):
        model = checkpoint.config
        layer_bytes = parameter_bytes(model, Shard(0, 1, False, False), dtype)
        self._layers = min(model.num_layers, max(3, -(-COLD_BYTES // layer_bytes)))
        self._max_tokens, self._page_size, self._device = max_tokens, page_size, device
        self._ahead = device.type == "cuda"
        self._far = min(FAR[self._ahead], max_tokens)
        self._long_context = min(LONG_CONTEXT[self._ahead], model.max_context // 2)
        self._context = min(CONTEXT[self._ahead], model.max_context // 4)
        self._width = -(-max(self._long_context + 1, min(max_tokens, model.max_context)) // page_size)
        self._max_prompt = min(max_tokens, model.max_context)
        near, far = (-(-(context + 1) // page_size) for context in (self._context, self._long_context))
        pages = max(self._width, self._far * far, max_tokens * near)
        if device.type == "cpu":
            page_bytes = page_size * model.kv_spec(dtype).token_bytes
            pages = max(pages, -(-COLD_BYTES // page_bytes))
        self._pages, self._slots, self._next_page, self._next_slot = pages, 4 * max_tokens + 8, 0, 0
        plan = Plan((0,), 1, max_tokens, self._slots, max_tokens, "vanilla", page_size, pages, 0, 0)
        dummy = replace(checkpoint, weights="dummy")
        self._short = load_stage(dummy, plan, Shard(0, 1, True, True), dtype, device)
        self._long = load_stage(dummy, plan, Shard(0, self._layers, False, False), dtype, device)
        if device.type == "cpu":
            self._short.touch()
            self._long.touch()
        self._hidden = torch.randn(max_tokens, model.hidden_size, device=device, dtype=dtype)
        self._sampling = sampling
        self._ids = torch.from_numpy(np.arange(max_tokens, dtype=np.int32) % model.vocab_size)
        if self._ahead:
            self._matrices = torch.randn(4, BUSY_SIDE, BUSY_SIDE, device=device, dtype=dtype)
            self._busy_for = 1
            self._busy_for = max(1, round(BUSY_S / min(self._seconds(self._work)[0] for _ in range(3))))

    def times(self) -> StageTimes:
        """Time visits that differ in one thing at a time, and tell from them what each thing costs."""
        most = self._max_tokens
        # Two rows may cost far more than one: products of matrices, no longer with a vector.
        sizes = sorted({size for size in (1, 2, 16, 64, 256, 512) if size < most} | {most})
        counts = sorted({*sizes, *self._steps})
        prompts = [_prompts(count) for count in counts]
        visits = [(shape, 0) for shape in (*prompts, (self._max_prompt,))]
        visits += [((1,) * size, self._context) for size in sizes]
        visits += [((1,) * self._far, self._long_context)]
        half = min(64, most // 2)
        self._mixed = ((1,) * half + (half,), self._context)
        visits += [self._mixed] if half > 1 else []
        shapes = [(False, visit, 0) for visit in visits] + [(True, visit, 0) for visit in visits]
        shapes += [(False, ((1,) * size, self._context), size) for size in sizes]
        took = self._time({shape: self._action(*shape) for shape in shapes})
        some = sorted({1, self._far, most})
        self._alone = {size: took[True, ((1,) * size, self._context), 0] for size in some if size in sizes}

        prompts_visit: Visit = (prompts[-1], 0)
        layer: dict[Visit, float] = {}
        rest: dict[Visit, float] = {}
        for visit in visits:
            short, long = took[False, visit, 0], took[True, visit, 0]
            layer[visit] = max(0.0, (long - short) / (self._layers - 1)) if self._layers > 1 else short
            rest[visit] = max(0.0, short - layer[visit])
        decodes = [((1,) * size, self._context) for size in sizes]
        head = [max(0.0, took[False, v, len(v[0])] - took[False, v, 0]) for v in decodes]
        layer_cost, rest_cost = (self._cost(seconds, counts, sizes) for seconds in (layer, rest))
        times = StageTimes(layer_cost, rest_cost, _curve(zip((0, *sizes), (0.0, *head), strict=True)))
        if not self._ahead:
            return times
        launch_s = self._launched[True, prompts_visit, 0] - self._launched[False, prompts_visit, 0]
        launch_s = max(0.0, launch_s / max(1, self._layers - 1))
        return replace(times, layer=self._for_long(times), ahead=True, launch_s=launch_s)

    def _for_long(self, times: StageTimes) -> Cost:
        """The cost of a layer when visits with prompts follow each other for seconds.

        A GPU at the limit of its power clocks down, by how much depends on what it does: prompts alone are products
        without a pause, decode rows between them read memory, for which it needs less.
        """
        tokens = min(LASTING_TOKENS, self._max_tokens)
        decodes, context = tokens // 3, self._long_context // 2
        if not decodes or tokens - decodes + context > self._width * self._page_size:
            return times.layer
        rest, shape = tokens - decodes, _prompts(tokens)
        prompts = Work(prefills=tokens, pairs=_pairs(shape))
        mixed = Work(decodes, decodes * (context + 1), rest, rest * (context + rest))
        prompts_last, mixed_last = (
            self._lasting(visit) / max(1e-9, self._layers * times.layer(work) + times.visit(work))
            for visit, work in (((shape, 0), prompts), (((1,) * decodes + (rest,), context), mixed))
        )
        return replace(times.layer, prompts_last=prompts_last, mixed_last=mixed_last)

    def _lasting(self, visit: Visit) -> float:
        """Seconds of a visit of the longer stage, after `LASTING_S` of the same."""
        action, row, begin = self._action(True, visit, 0), IN_A_ROW, time.monotonic()
        while True:
            seconds, _ = self._seconds(action, row)
            if time.monotonic() > begin + LASTING_S:
                return seconds
            row = max(IN_A_ROW, round(LASTING_ROW_S / seconds))

    @property
    def scenes(self) -> list[Scene]:
        """Visits of decodes to rehearse, and how long `forward` took for them when `times` measured it."""
        return [
            Scene(self._entered(self._long, (1,) * size, self._context), self._hidden[:size].clone(), seconds)
            for size, seconds in self._alone.items()
        ]

    def forward(self, plan: VisitPlan, x: torch.Tensor) -> torch.Tensor:
        """A visit of the longer stage. x: [T, hidden]."""
        return self._long.forward(plan, x)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self._hidden.shape[1] * self._hidden.element_size()

    @property
    def graph_bytes(self) -> int:
        """Bytes of device memory that the graphs of one layer take; a little of it is not the layers'."""
        return self._long.graph_bytes // self._layers

    def _work(self) -> None:
        """Multiply matrices for most of the time, and read and write memory for the rest."""
        first, second, product, copy = self._matrices
        torch.mm(first, second, out=product)
        copy.copy_(product)

    def _seconds(self, action: Callable[[], object], row: int = IN_A_ROW) -> tuple[float, float]:
        """Seconds of `action`, and those of the host.

        On a GPU `row` of them in a row, behind something that keeps the device busy until the host has launched them
        all. That is work much like theirs: a GPU that has rested runs at a higher clock than its power allows for long.
        """
        if self._device.type != "cuda":
            begin = time.perf_counter()
            action()
            took = time.perf_counter() - begin
            return took, took
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._busy_for):
            self._work()
        begin = time.perf_counter()
        first.record()
        for _ in range(row):
            action()
        last.record()
        launched = time.perf_counter() - begin
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / row, launched / row

    @property
    def _steps(self) -> list[int]:
        """The numbers of tokens to which a GPU's larger visits are padded: what lies between takes as long."""
        if not self._ahead:
            return []
        counts = graph_tokens(self._max_tokens, torch.cuda.get_device_name(self._device))
        return [count for count in counts if count > MOST_ROWS]

    def _cost(self, seconds: dict[Visit, float], counts: Sequence[int], sizes: Sequence[int]) -> Cost:
        """The cost of visits that took `seconds`: some of `counts` prompt tokens each, some of `sizes` decode rows."""
        several, one = _prompts(counts[-1]), (self._max_prompt,)
        more_pairs = _pairs(one) - _pairs(several)
        per_pair = seconds[one, 0] - seconds[several, 0]
        pair_s = max(0.0, per_pair / more_pairs) if sum(one) == counts[-1] and more_pairs > 0 else 0.0
        far, more_kv = (1,) * self._far, self._far * (self._long_context - self._context)
        kv_s = max(0.0, (seconds[far, self._long_context] - seconds[far, self._context]) / more_kv)
        tokens = {
            count: max(0.0, seconds[shape, 0] - pair_s * _pairs(shape))
            for count, shape in zip(counts, map(_prompts, counts), strict=True)
        }
        decodes = [
            seconds[(1,) * size, self._context] - tokens[size] - kv_s * size * (self._context + 1) for size in sizes
        ]
        cost = Cost(_stepped(tokens, self._steps), _curve(zip(sizes, decodes, strict=True)), kv_s, pair_s)
        if self._mixed not in seconds:
            return cost
        new, context = self._mixed
        half = new[-1]
        work = Work(half, half * (context + 1), half, half * (context + half))
        return replace(cost, mixed_s=max(0.0, seconds[self._mixed] - cost(work)))

    def _action(self, long: bool, visit: Visit, sampled: int) -> Callable[[], object]:
        plan = self._entered(self._long if long else self._short, *visit)
        plan = replace(plan, samples=(np.arange(plan.rows) < sampled).astype(np.int32))
        if long:
            x = self._hidden[: plan.tokens].clone()
            return lambda: self._long.forward(plan, x)
        ids = self._ids[: plan.tokens]
        return lambda: self._short.forward(plan, ids)

    def _time(self, actions: dict[Shape, Callable[[], object]], samples: int = 4) -> dict[Shape, float]:
        """Seconds of each action. All take turns, so that a moment's disturbance does not hit one of them alone."""
        times: dict[Shape, list[float]] = {key: [] for key in actions}
        launched: dict[Shape, float] = {}
        deadline = time.monotonic() + LONGEST_S
        for taken in range(samples + 1):
            if taken >= FEWEST[self._ahead] and time.monotonic() > deadline:
                break
            for key, action in actions.items():
                took, launched[key] = self._seconds(action)
                times[key].append(took)
        self._launched = launched
        lows = {key: min(values[1:]) for key, values in times.items()}
        # The least of each is what differences can be taken of; the whole, though, takes as long as it usually does.
        usual = sum(statistics.median(values[1:]) for values in times.values()) / sum(lows.values())
        return {key: low * usual for key, low in lows.items()}

    def _entered(self, stage: Stage, new_tokens: Sequence[int], context: int) -> VisitPlan:
        """The plan of a visit, on pages that no other was on lately. Sequences with `context` are known to `stage`."""
        rows = len(new_tokens)
        width = -(-(max(new_tokens) + context) // self._page_size)
        if self._next_slot + rows > self._slots:
            self._next_slot = 0
        slots = np.arange(self._next_slot, self._next_slot + rows, dtype=np.int32)
        index = np.arange(rows * width)
        pages = (self._next_page + index) % self._pages
        self._next_slot, self._next_page = self._next_slot + rows, (self._next_page + rows * width) % self._pages
        entry = VisitPlan(
            0,
            page_writes=np.stack([slots[index // width], index % width, pages], 1).astype(np.int32),
            admissions=[encode_sampling(slot, self._sampling) for slot in slots.tolist()],
        )
        plan = VisitPlan(
            0,
            slots=slots,
            new_tokens=np.array(new_tokens, np.int32),
            context=np.full(rows, context, np.int32),
            samples=np.ones(rows, np.int32),
        )
        if not context:
            return replace(plan, page_writes=entry.page_writes, admissions=entry.admissions)
        stage.forward(entry, self._ids[:0])
        return plan


def _curve(points: Iterable[tuple[int, float]]) -> Curve:
    at, seconds = zip(*points, strict=True)
    return Curve(tuple(map(float, at)), seconds)


def _stepped(seconds: dict[int, float], steps: Container[int]) -> Curve:
    """The curve of `seconds` by count, where counts up to one of `steps` take as long as that."""
    points = list(seconds.items())
    points += [
        (before + 1, seconds[step])
        for before, step in itertools.pairwise(sorted(seconds))
        if step in steps and before + 1 < step
    ]
    return _curve(sorted(points))


def _prompts(tokens: int, length: int = 64) -> tuple[int, ...]:
    """`tokens` tokens as rows of `length` each."""
    whole, rest = divmod(tokens, length)
    return (length,) * whole + ((rest,) if rest else ())


def _pairs(shape: Sequence[int]) -> int:
    """Pairs of tokens in prompts of the lengths `shape`."""
    return sum(n * n for n in shape)


def measure_scheduling(page_size: int, max_tokens: int) -> Curve:
    """Seconds that rank 0 spends on a visit beside its stage (taking in tokens, planning, encoding), by its rows."""
    points = [(float(rows), _scheduling(rows, page_size, ANSWER)) for rows in (1, 64, min(512, max(65, max_tokens)))]
    return Curve(tuple(rows for rows, _ in points), tuple(seconds for _, seconds in points))


def measure_requests(page_size: int) -> float:
    """Seconds that rank 0 spends on a request beside its visits: admission, completion, and its line of results."""
    rows = 64
    come_and_go = (_scheduling(rows, page_size, 1) - _scheduling(rows, page_size, ANSWER)) / rows
    tokens = np.arange(ANSWER, dtype=np.int32)
    answers = [Completion(Request(f"{row}", tokens), tokens, "length") for row in range(WRITTEN)]
    with tempfile.TemporaryDirectory() as folder, ResultsWriter(Path(folder) / "results", False, "") as writer:
        begin = time.perf_counter()
        for answer in answers:
            writer.completion(answer, Answer(" ".join(map(str, tokens.tolist()))))
        return max(0.0, come_and_go) + (time.perf_counter() - begin) / WRITTEN


def _scheduling(rows: int, page_size: int, answer: int) -> float:
    """Seconds of scheduling a visit of `rows` sequences that end after `answer` tokens."""
    pages = rows * (ANSWER // page_size + 2)
    layout = Plan((0,), 1, rows, rows, rows, "prefill_first", page_size, pages, 0, 0)
    scheduler = Scheduler(layout, Alike(1, answer))

    def visit() -> IntArray:
        scheduler.commit(0, VisitResult(np.zeros(scheduler.awaited(0), np.int32)))
        plan, _ = scheduler.plan(0)
        return VisitPlan.decode(plan.encode()).slots

    visit()
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        visit()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
