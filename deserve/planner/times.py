"""How long things take: the visits of a stage and the links between stages, as measured or from stated rates."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from deserve.batch import VisitPlan
from deserve.layout import BUDGETS, Shard, slab_slots
from deserve.model.config import ExpertConfig, ModelConfig
from deserve.model.weights import layer_kinds, parameter_bytes, unpack_bytes

POWERS = tuple(2**power for power in range(17))  # tokens


class VisitLoad(NamedTuple):
    """What a visit computes, as far as its time depends on it. Counts may be means."""

    decodes: float = 0  # rows of one token
    decode_kv: float = 0  # tokens of KV cache that they read
    prefills: float = 0  # prompt tokens
    pairs: float = 0  # prompt tokens times the KV tokens of their sequence, summed over prompts
    sampled: float = 0  # tokens that the last rank samples
    swapped: float = 0  # pages that come in from host memory
    moved: float = 0  # pages of sequences that are suspended or resumed
    # Of decode_kv and pairs, what lies outside the window of a layer that has one
    outside_kv: float = 0
    outside_pairs: float = 0

    @property
    def tokens(self) -> float:
        return self.decodes + self.prefills

    @staticmethod
    def of(plan: VisitPlan, window: int, swapped: int = 0, grain: int = 1) -> "VisitLoad":
        """One of `grain` visits for which `plan` stands (see Simulator).

        `window`: tokens, 0: no layer has one. `swapped`: pages that come in.
        """
        new, context = plan.new_tokens, plan.context
        decoding = new == 1
        if plan.admissions:  # a prompt of one token
            decoding &= ~np.isin(plan.slots, [admission[0] for admission in plan.admissions])
        decodes, prompts = int(np.count_nonzero(decoding)), new[~decoding]
        reach = context[~decoding] + prompts
        return VisitLoad(
            decodes=decodes,
            decode_kv=float(grain * context[decoding].sum() + decodes * (1 + grain) / 2),
            prefills=int(prompts.sum()),
            pairs=float(grain * (prompts * reach).sum()),
            sampled=decodes + (plan.sampled - decodes) / grain,
            swapped=swapped,
            moved=(len(plan.stash) + len(plan.restore)) / grain,
            outside_kv=float(outside(grain * context[decoding], window).sum()),
            outside_pairs=float((prompts * outside(grain * reach, window)).sum()),
        )


def outside(context: Any, window: int) -> Any:
    """Of `context` tokens, an array or a number, those outside a `window`; 0: there is none."""
    return np.maximum(0, context - window) if window else 0 * context


@dataclass(frozen=True)
class Curve:
    """Seconds as a function of a count: linear between the points (`at`, `seconds`), and on with the last slope."""

    at: tuple[float, ...] = (0.0,)
    seconds: tuple[float, ...] = (0.0,)

    @staticmethod
    def through(points: Iterable[tuple[float, float]]) -> "Curve":
        """The curve through `points` (count, seconds), sorted by count."""
        at, seconds = zip(*points, strict=True)
        return Curve(tuple(map(float, at)), seconds)

    def __call__(self, count: float) -> float:
        if len(self.at) == 1:
            return self.seconds[0]
        right = min(max(bisect_right(self.at, count), 1), len(self.at) - 1)
        x0, x1, y0, y1 = self.at[right - 1], self.at[right], self.seconds[right - 1], self.seconds[right]
        return max(0.0, y0 + (y1 - y0) * (max(count, self.at[0]) - x0) / (x1 - x0))


@dataclass(frozen=True)
class Cost:
    """Seconds of a `VisitLoad`: by its tokens, what decode rows add to that, and attention to the KV cache.

    windowed: attention to what the window holds.
    """

    tokens: Curve = field(default_factory=Curve)
    decodes: Curve = field(default_factory=Curve)
    kv_s: float = 0.0  # per KV token that a decode row reads
    pair_s: float = 0.0  # per pair of a prompt token and a KV token
    mixed_s: float = 0.0  # where decodes and prompts share a visit: their attention runs separately
    windowed: bool = False

    def __call__(self, load: VisitLoad) -> float:
        kv, pairs = self.attended(load)
        seconds = self.tokens(load.tokens) + self.kv_s * kv + self.pair_s * pairs
        if load.decodes or not load.prefills:
            seconds += self.decodes(load.decodes)
        return seconds + (self.mixed_s if load.decodes and load.prefills else 0.0)

    def attended(self, load: VisitLoad) -> tuple[float, float]:
        """KV tokens that decode rows read, and pairs of prompt and KV tokens."""
        if not self.windowed:
            return load.decode_kv, load.pairs
        return max(0.0, load.decode_kv - load.outside_kv), max(0.0, load.pairs - load.outside_pairs)


@dataclass(frozen=True)
class StageTimes:
    """What one rank takes for a visit.

    Layers are counted by their kind: `counts` has how many of each of `layers` there are.
    """

    layers: tuple[Cost, ...]  # one of each kind
    visit: Cost = field(default_factory=Cost)  # once per visit: addresses, masks, the embedding
    head: Curve = field(default_factory=Curve)  # output layer and sampler, by rows; the last rank only
    plan: Curve = field(default_factory=Curve)  # scheduling, by rows; rank 0 only
    host: Curve = field(default_factory=Curve)  # what the host does in the loop beside that, by tokens
    page_s: float = 0.0  # bringing in one page of one layer from host memory
    ahead: bool = False  # a device computes while its host works on the next visits and pages are brought in
    start_s: float = 0.0  # from the arrival of a visit's frame until its work begins on an idle rank
    request_s: float = 0.0  # admitting a request, and writing its result; rank 0 only
    slow: float = 1.0  # times what was measured, by which an earlier start found the rank's visits to be slower
    sliding: bool = False  # layers with a window have sliding pages, which stay on the device

    def seconds(self, load: VisitLoad, counts: Sequence[int], first: bool, last: bool) -> float:
        """One visit of a rank with such layers, which may be the ring's `first`, its `last`, or both."""
        seconds = self.slow * self.compute_s(load, counts, last)
        host = self.host_s(load, first)
        if self.ahead:
            # When a visit begins, the slab holds the pages of some layers; the others come in meanwhile.
            layers = self.swapping(counts)
            return max(seconds, (layers - slab_slots(layers)) * self.page_s * load.swapped, host)
        return seconds + host + self.copies(load, counts)

    def compute_s(self, load: VisitLoad, counts: Sequence[int], last: bool) -> float:
        """What a visit computes, as measured by the survey."""
        seconds = self.layers_s(load, counts) + self.visit(load)
        if load.moved:
            seconds += self.swapping(counts) * self.page_s * load.moved
        return seconds + self.head(load.sampled) if last else seconds

    def layers_s(self, load: VisitLoad, counts: Sequence[int]) -> float:
        """The layers alone."""
        return sum(count * layer(load) for count, layer in zip(counts, self.layers, strict=True) if count)

    def host_s(self, load: VisitLoad, first: bool) -> float:
        """What the host does for a visit beside its layers."""
        begun = load.sampled - load.decodes  # prompts that are followed by their first token
        return self.host(load.tokens) + (self.plan(load.tokens) + self.request_s * begun if first else 0.0)

    def swapping(self, counts: Sequence[int]) -> int:
        """How many layers have pages that may lie in host memory."""
        pairs = zip(counts, self.layers, strict=True)
        return sum(count for count, layer in pairs if not (self.sliding and layer.windowed))

    def copies(self, load: VisitLoad, counts: Sequence[int]) -> float:
        """Bringing in the visit's swap pages."""
        return self.swapping(counts) * self.page_s * load.swapped


@dataclass(frozen=True)
class LinkTimes:
    """A link to the next rank: one-way latency in seconds, and seconds per byte. `far`: it joins two hosts."""

    latency_s: float = 0.0
    byte_s: float = 0.0
    far: bool = False


@dataclass(frozen=True)
class Machine:
    """The ranks in order and the links that leave them; `memory` is what each rank has for weights and KV pages.

    `hidden_bytes`: one token's hidden state on a link; `coded_bytes` on a far one, if activations are `coded`.
    `page_bytes`: one KV page of one layer. `graph_bytes`: the CUDA graphs of one layer. `receives_on_device`: frames
    of hidden states arrive in the memory of the stage. `budgets`: tokens of a visit that are worth a plan, up to as
    many as were measured. `kinds`: of each layer, which of StageTimes.layers it is; empty: there is one kind.
    """

    stages: tuple[StageTimes, ...]
    links: tuple[LinkTimes, ...]
    memory: tuple[int, ...]  # bytes
    host_memory: int  # bytes that swap pages and the host pool of one rank may take
    hidden_bytes: int
    page_bytes: int
    graph_bytes: int = 0
    receives_on_device: bool = False
    budgets: tuple[int, ...] = BUDGETS[:1]
    coded_bytes: int = 0
    coded: bool = False
    window: int = 0  # tokens that a layer with a window attends to; 0: no layer has one
    kinds: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        return len(self.stages)

    @cached_property
    def latency_s(self) -> float:
        """Once round the ring, without any load."""
        return sum(link.latency_s for link in self.links) if self.ranks > 1 else 0.0

    def counts(self, first: int, last: int) -> tuple[int, ...]:
        """How many of the layers `first` to `last` (exclusive) are of each kind."""
        if not self.kinds:
            return (last - first,)
        kinds = self.kinds[first:last]
        return tuple(kinds.count(kind) for kind in range(len(self.stages[0].layers)))

    def ring(self, first: int, size: int) -> "Machine":
        """`size` ranks from `first` on as a ring of their own. Its way back was not measured: as its longest link."""
        if size == self.ranks:
            return self
        ranks = slice(first, first + size)
        head = replace(self.stages[first], plan=self.stages[0].plan, request_s=self.stages[0].request_s)
        links = self.links[ranks][:-1]
        back = max(links, key=lambda link: link.latency_s, default=LinkTimes())
        stages = (head, *self.stages[ranks][1:])
        return replace(self, stages=stages, links=(*links, back), memory=self.memory[ranks])

    def token_bytes(self, rank: int) -> int:
        """One token's hidden state on the link that leaves `rank`."""
        return self.coded_bytes if self.coded and self.links[rank].far else self.hidden_bytes

    def start_s(self, rank: int) -> float:
        """From the arrival of a visit's frame until its work begins on the idle `rank`. A single GPU knows its next
        visit before its last one ends."""
        return 0.0 if self.ranks == 1 and self.stages[0].ahead else self.stages[rank].start_s

    def reading_binds(self, rows: int) -> bool:
        """Whether one row takes at least half as long as `rows`: then further tokens of a visit cost little."""
        times, every = self.stages[0], self.counts(0, len(self.kinds) or 1)
        one, all_rows = (times.layers_s(VisitLoad(decodes=count), every) for count in (1, rows))
        return 2 * one >= all_rows

    def frame_bytes(self, load: VisitLoad, rank: int) -> float:
        """What a visit puts on the link that leaves `rank`: the plan and hidden states, or sampled tokens."""
        if rank == self.ranks - 1:
            return 16 + 4 * load.sampled
        return 72 + 16 * (load.decodes + load.sampled) + load.tokens * self.token_bytes(rank)


class Cycle(NamedTuple):
    """Seconds of a visit on its way round the ring."""

    trip: float  # all of it, without waiting
    busiest: float  # on the slowest rank
    wire: float  # its frames on the busiest link
    copies: float  # bringing in its swap pages, on the slowest rank

    def seconds(self, rounds: float) -> float:
        """From one visit of a round to its next, where `rounds` are under way: the trip, or the longest queue."""
        return max(self.trip, rounds * max(self.busiest, self.wire, self.copies))


class Stages:
    """The stages of a machine on which each rank holds the layers from `partition` on. Alike ones are asked once."""

    def __init__(self, machine: Machine, partition: Sequence[int], layers: int):
        """`partition`: the first layer of each rank, of `layers` in all."""
        self.machine = machine
        ends, last = (*partition[1:], layers), machine.ranks - 1
        kinds: dict[tuple[StageTimes, tuple[int, ...], bool, bool], int] = {}
        self.kind_of = [
            kinds.setdefault((times, machine.counts(first, end), rank == 0, rank == last), len(kinds))
            for rank, (times, first, end) in enumerate(zip(machine.stages, partition, ends, strict=True))
        ]
        self.kinds = list(kinds)
        self._starts_s = sum(map(machine.start_s, range(machine.ranks)))

    def seconds(self, load: VisitLoad) -> list[float]:
        """A visit on each rank."""
        seconds = [times.seconds(load, counts, first, last) for times, counts, first, last in self.kinds]
        return [seconds[kind] for kind in self.kind_of]

    def copies(self, load: VisitLoad) -> list[float]:
        """Bringing in its swap pages on each rank."""
        copies = [times.copies(load, counts) for times, counts, _, _ in self.kinds]
        return [copies[kind] for kind in self.kind_of]

    def wires(self, load: VisitLoad) -> list[float]:
        """Its frames on the link that leaves each rank."""
        machine = self.machine
        return [link.byte_s and link.byte_s * machine.frame_bytes(load, r) for r, link in enumerate(machine.links)]

    def cycle(self, load: VisitLoad, drafting_s: float = 0.0) -> Cycle:
        """`drafting_s`: what rank 0 needs for draft tokens beside the visit."""
        seconds, wires = self.seconds(load), self.wires(load)
        seconds[0] += drafting_s
        trip = sum(seconds) + self._starts_s + sum(wires) + self.machine.latency_s
        return Cycle(trip, max(seconds), max(wires), max(self.copies(load)))


def stated_times(
    model: ModelConfig,
    dtype: torch.dtype,
    bytes_per_s: float,
    flops: float,
    layer_s: float | None,
    most_tokens: int,
    page_s: float = 0.0,
    fp8_pages: bool = False,
) -> StageTimes:
    """The roofline of a device that reads `bytes_per_s` and computes `flops` a second: each product takes the longer
    of reading its weights and multiplying, packed weights are unpacked before or read as they are (`model.gemm`).
    `layer_s`, where given, is what a layer takes however many its tokens.

    `page_s`: see StageTimes. Source: Williams, Waterman, Patterson, "Roofline", CACM 52 (2009).
    """

    def product(weight_bytes: int, read_bytes: int, unpack_s: float = 0.0) -> Curve:
        knee = read_bytes / bytes_per_s * flops / (2 * weight_bytes / dtype.itemsize)  # tokens
        end = max(float(most_tokens), 2 * knee)
        fixed = read_bytes / bytes_per_s
        return Curve((0.0, knee, end), (unpack_s + fixed, unpack_s + fixed, unpack_s + fixed * end / knee))

    def experts_s(experts: ExpertConfig, weight_bytes: int, tokens: float) -> float:
        """Those of them that `tokens` tokens touch are read."""
        reading = experts.touched(tokens) / experts.count * weight_bytes / bytes_per_s
        return max(reading, 2 * tokens * experts.active / experts.count * weight_bytes / dtype.itemsize / flops)

    kv_s = model.kv_spec(dtype, fp8_pages).token_bytes / bytes_per_s
    pair_s = 4 * model.q_size / flops / 2  # two products of two operations; causal: half of the pairs

    def layer(index: int) -> Cost:
        shard, experts = Shard(index, index + 1, False, False), model.experts_of(index)
        tokens = Curve((0.0,), (layer_s or 0.0,))
        if layer_s is None:
            nbytes = parameter_bytes(replace(model, quantisation=None), shard, dtype)
            inner = experts.count * experts.intermediate_size if experts else 0
            expert_bytes = 3 * inner * model.hidden_size * dtype.itemsize
            read = nbytes - expert_bytes
            if model.quantisation is not None and model.quantisation.fused:
                read = parameter_bytes(model, shard, dtype)
            unpack_s = unpack_bytes(model, shard, dtype) / bytes_per_s
            tokens = dense = product(nbytes - expert_bytes, read, unpack_s)
            if experts:
                tokens = Curve.through(
                    (count, dense(count) + experts_s(experts, expert_bytes, count)) for count in (0, *POWERS)
                )
        return Cost(tokens, kv_s=kv_s, pair_s=pair_s, windowed=bool(model.sliding(index, index + 1)))

    kinds = layer_kinds(model, dtype)
    head_bytes = model.vocab_size * model.hidden_size * dtype.itemsize
    head = product(head_bytes, head_bytes)
    layers = tuple(layer(kinds.index(kind)) for kind in range(max(kinds) + 1))
    return StageTimes(layers, head=head, page_s=page_s, ahead=True)
