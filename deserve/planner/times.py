"""How long things take: the visits of a stage and the links between stages, as measured or from stated rates."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from deserve.batch import VisitPlan
from deserve.layout import BUDGETS, Shard, slab_slots
from deserve.model.config import ExpertConfig, ModelConfig
from deserve.model.weights import parameter_bytes, unpack_bytes

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

    @property
    def tokens(self) -> float:
        return self.decodes + self.prefills

    @staticmethod
    def of(plan: VisitPlan, swapped: int = 0, grain: int = 1) -> "VisitLoad":
        """One of `grain` visits for which `plan` stands (see Simulator).

        `swapped`: pages that come in.
        """
        new, context = plan.new_tokens, plan.context
        decoding = new == 1
        if plan.admissions:  # a prompt of one token
            decoding &= ~np.isin(plan.slots, [admission[0] for admission in plan.admissions])
        decodes, prompts = int(np.count_nonzero(decoding)), new[~decoding]
        return VisitLoad(
            decodes=decodes,
            decode_kv=float(grain * context[decoding].sum() + decodes * (1 + grain) / 2),
            prefills=int(prompts.sum()),
            pairs=float(grain * (prompts * (context[~decoding] + prompts)).sum()),
            sampled=decodes + (plan.sampled - decodes) / grain,
            swapped=swapped,
            moved=(len(plan.stash) + len(plan.restore)) / grain,
        )


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
    """Seconds of a `VisitLoad`: by its tokens, what decode rows add to that, and attention to the KV cache."""

    tokens: Curve = field(default_factory=Curve)
    decodes: Curve = field(default_factory=Curve)
    kv_s: float = 0.0  # per KV token that a decode row reads
    pair_s: float = 0.0  # per pair of a prompt token and a KV token
    mixed_s: float = 0.0  # where decodes and prompts share a visit: their attention runs separately

    def __call__(self, load: VisitLoad) -> float:
        seconds = self.tokens(load.tokens) + self.kv_s * load.decode_kv + self.pair_s * load.pairs
        if load.decodes or not load.prefills:
            seconds += self.decodes(load.decodes)
        return seconds + (self.mixed_s if load.decodes and load.prefills else 0.0)


@dataclass(frozen=True)
class StageTimes:
    """What one rank takes for a visit."""

    layer: Cost  # each layer
    visit: Cost = field(default_factory=Cost)  # once per visit: addresses, masks, the embedding
    head: Curve = field(default_factory=Curve)  # output layer and sampler, by rows; the last rank only
    plan: Curve = field(default_factory=Curve)  # scheduling, by rows; rank 0 only
    host: Curve = field(default_factory=Curve)  # what the host does in the loop beside that, by tokens
    page_s: float = 0.0  # bringing in one page of one layer from host memory
    ahead: bool = False  # a device computes while its host works on the next visits and pages are brought in
    start_s: float = 0.0  # from the arrival of a visit's frame until its work begins on an idle rank
    request_s: float = 0.0  # admitting a request, and writing its result; rank 0 only
    slow: float = 1.0  # times what was measured, by which an earlier start found the rank's visits to be slower

    def seconds(self, load: VisitLoad, layers: int, first: bool, last: bool) -> float:
        """One visit of a rank with `layers` layers, which may be the ring's `first`, its `last`, or both."""
        seconds = self.slow * self.compute_s(load, layers, last)
        host = self.host_s(load, first)
        if self.ahead:
            # When a visit begins, the slab holds the pages of some layers; the others come in meanwhile.
            return max(seconds, self.copies(load, layers - slab_slots(layers)), host)
        return seconds + host + self.copies(load, layers)

    def compute_s(self, load: VisitLoad, layers: int, last: bool) -> float:
        """What a visit computes, as measured by the survey."""
        seconds = layers * (self.layer(load) + self.page_s * load.moved) + self.visit(load)
        return seconds + self.head(load.sampled) if last else seconds

    def host_s(self, load: VisitLoad, first: bool) -> float:
        """What the host does for a visit beside its layers."""
        begun = load.sampled - load.decodes  # prompts that are followed by their first token
        return self.host(load.tokens) + (self.plan(load.tokens) + self.request_s * begun if first else 0.0)

    def copies(self, load: VisitLoad, layers: int) -> float:
        """Bringing in the visit's swap pages."""
        return layers * self.page_s * load.swapped

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "StageTimes":
        def curve(points: dict[str, Any]) -> Curve:
            return Curve(tuple(points["at"]), tuple(points["seconds"]))

        def cost(parts: dict[str, Any]) -> Cost:
            return Cost(**{**parts, "tokens": curve(parts["tokens"]), "decodes": curve(parts["decodes"])})

        parts = {name: cost(raw[name]) for name in ("layer", "visit")}
        curves = {name: curve(raw[name]) for name in ("head", "plan", "host")}
        return StageTimes(**{**raw, **parts, **curves})


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
    many as were measured.
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
    window: int = 0  # tokens that a layer with a window attends to
    windowed: float = 0.0  # fraction of the layers that have one, as far as the times are those of layers without

    @property
    def ranks(self) -> int:
        return len(self.stages)

    @cached_property
    def latency_s(self) -> float:
        """Once round the ring, without any load."""
        return sum(link.latency_s for link in self.links) if self.ranks > 1 else 0.0

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "Machine":
        stages = tuple(map(StageTimes.from_json, raw["stages"]))
        links = tuple(LinkTimes(**link) for link in raw["links"])
        tuples = {key: tuple(raw[key]) for key in ("memory", "budgets")}
        return Machine(**{**raw, "stages": stages, "links": links, **tuples})

    def token_bytes(self, rank: int) -> int:
        """One token's hidden state on the link that leaves `rank`."""
        return self.coded_bytes if self.coded and self.links[rank].far else self.hidden_bytes

    def reading_binds(self, rows: int) -> bool:
        """Whether one row takes at least half as long as `rows`: then further tokens of a visit cost little."""
        layer = self.stages[0].layer
        return 2 * layer(VisitLoad(decodes=1)) >= layer(VisitLoad(decodes=rows))

    def attended(self, context: Any) -> Any:
        """Of `context` tokens, an array or a number, those that a mean layer attends to."""
        return context - self.windowed * np.maximum(0, context - self.window)

    def frame_bytes(self, load: VisitLoad, rank: int) -> float:
        """What a visit puts on the link that leaves `rank`: the plan and hidden states, or sampled tokens."""
        if rank == self.ranks - 1:
            return 16 + 4 * load.sampled
        return self.plan_bytes(load) + load.tokens * self.token_bytes(rank)

    def plan_bytes(self, load: VisitLoad) -> float:
        """A visit's plan in a frame."""
        return 72 + 16 * (load.decodes + load.sampled)


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
    of reading its weights and multiplying, packed weights are unpacked before. `layer_s`, where given, is what a layer
    takes however many its tokens.

    `page_s`: see StageTimes. Source: Williams, Waterman, Patterson, "Roofline", CACM 52 (2009).
    """

    def product(weight_bytes: int, unpack_s: float = 0.0) -> Curve:
        knee = weight_bytes / bytes_per_s * flops / (2 * weight_bytes / dtype.itemsize)  # tokens
        end = max(float(most_tokens), 2 * knee)
        fixed = weight_bytes / bytes_per_s
        return Curve((0.0, knee, end), (unpack_s + fixed, unpack_s + fixed, unpack_s + fixed * end / knee))

    def experts_s(experts: ExpertConfig, weight_bytes: int, tokens: float) -> float:
        """Those of them that `tokens` tokens touch are read."""
        reading = experts.touched(tokens) / experts.count * weight_bytes / bytes_per_s
        return max(reading, 2 * tokens * experts.active / experts.count * weight_bytes / dtype.itemsize / flops)

    every = Shard(0, model.num_layers, False, False)
    weight_bytes = parameter_bytes(replace(model, quantisation=None), every, dtype)
    layers = [each for each in map(model.experts_of, range(model.num_layers)) if each]
    expert_bytes = [3 * each.count * each.intermediate_size * model.hidden_size * dtype.itemsize for each in layers]
    layer_bytes = (weight_bytes - sum(expert_bytes)) // model.num_layers
    unpack_s = unpack_bytes(model, every, dtype) / bytes_per_s / model.num_layers
    kv_s = model.kv_spec(dtype, fp8_pages).token_bytes / bytes_per_s
    pair_s = 4 * model.q_size / flops / 2  # two products of two operations; causal: half of the pairs
    tokens = product(layer_bytes, unpack_s) if layer_s is None else Curve((0.0,), (layer_s,))
    if layers and layer_s is None:
        share, dense = len(layers) / model.num_layers, tokens
        tokens = Curve.through(
            (count, dense(count) + share * experts_s(layers[0], expert_bytes[0], count)) for count in (0, *POWERS)
        )
    head = product(model.vocab_size * model.hidden_size * dtype.itemsize)
    return StageTimes(Cost(tokens, kv_s=kv_s, pair_s=pair_s), head=head, page_s=page_s, ahead=True)
