"""How long things take: the visits of a stage and the links between stages, as measured or from stated rates."""

from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from deserve.kvcache.layout import slab_slots
from deserve.model.config import ModelConfig
from deserve.model.weights import Shard, parameter_bytes
from deserve.planner.plan import BUDGETS


class Work(NamedTuple):
    """What a visit computes, as far as time depends on it."""

    decodes: float = 0  # rows of one token
    decode_kv: float = 0  # tokens of KV cache that they read
    prefills: float = 0  # tokens of prompts
    pairs: float = 0  # prompt tokens times the KV tokens of their sequence, summed over prompts
    sampled: float = 0  # tokens that the last rank samples
    swapped: float = 0  # pages that come in from host memory
    moved: float = 0  # pages of sequences that are suspended or resumed

    @property
    def tokens(self) -> float:
        return self.decodes + self.prefills


@dataclass(frozen=True)
class Curve:
    """Seconds as a function of a count: linear between the points (`at`, `seconds`), and on with the last slope."""

    at: tuple[float, ...] = (0.0,)
    seconds: tuple[float, ...] = (0.0,)

    def __call__(self, count: float) -> float:
        if len(self.at) == 1:
            return self.seconds[0]
        right = min(max(bisect_right(self.at, count), 1), len(self.at) - 1)
        x0, x1, y0, y1 = self.at[right - 1], self.at[right], self.seconds[right - 1], self.seconds[right]
        return max(0.0, y0 + (y1 - y0) * (max(count, self.at[0]) - x0) / (x1 - x0))

    def scaled(self, factor: float) -> "Curve":
        """`factor` times as many seconds."""
        return Curve(self.at, tuple(factor * seconds for seconds in self.seconds))


@dataclass(frozen=True)
class Cost:
    """Seconds of some `Work`: by its tokens, what decode rows add to that, and attention to the KV cache."""

    tokens: Curve = field(default_factory=Curve)
    decodes: Curve = field(default_factory=Curve)
    kv_s: float = 0.0  # per KV token that a decode row reads
    pair_s: float = 0.0  # per pair of a prompt's token and a KV token
    mixed_s: float = 0.0  # where decodes and prompts meet in a visit: they attend apart
    # Times as long as all that, where visits follow each other for long and power runs short.
    prompts_last: float = 1.0  # of prompts alone
    mixed_last: float = 1.0  # of decodes and prompts

    def __call__(self, work: Work) -> float:
        seconds = self.tokens(work.tokens) + self.kv_s * work.decode_kv + self.pair_s * work.pairs
        if not work.prefills:
            return seconds + self.decodes(work.decodes)
        if not work.decodes:
            return seconds * self.prompts_last
        return (seconds + self.mixed_s + self.decodes(work.decodes)) * self.mixed_last

    def scaled(self, factor: float) -> "Cost":
        """`factor` times as many seconds."""
        tokens, decodes = self.tokens.scaled(factor), self.decodes.scaled(factor)
        kv_s, pair_s, mixed_s = (factor * seconds for seconds in (self.kv_s, self.pair_s, self.mixed_s))
        return replace(self, tokens=tokens, decodes=decodes, kv_s=kv_s, pair_s=pair_s, mixed_s=mixed_s)


@dataclass(frozen=True)
class StageTimes:
    """What one rank takes for a visit."""

    layer: Cost  # each layer
    visit: Cost = field(default_factory=Cost)  # once a visit: addresses, masks, the embedding, host work
    head: Curve = field(default_factory=Curve)  # output layer and sampler, by rows; the last rank only
    plan: Curve = field(default_factory=Curve)  # scheduling, by rows; rank 0 only
    frames: Curve = field(default_factory=Curve)  # the host's part in receiving and sending, by bytes of hidden states
    page_s: float = 0.0  # bringing in one page of one layer from host memory
    ahead: bool = False  # a device computes, while its host works on the next visits and pages are brought in
    start_s: float = 0.0  # from the arrival of a visit's frame until such a device begins, beside the host's part
    launch_s: float = 0.0  # the host's launches of a layer, where the visit is not one CUDA graph: with prompts in it
    request_s: float = 0.0  # a request's coming and going, beside its visits; rank 0 only

    def seconds(self, work: Work, layers: int, first: bool, last: bool, hidden_bytes: int) -> float:
        """One visit of a rank with `layers` layers, which may be the ring's `first`, its `last`, or both."""
        seconds = layers * self.layer(work) + self.visit(work)
        if last:
            seconds += self.head(work.sampled)
        seconds += layers * self.page_s * work.moved
        host = self.host(work, first, last, hidden_bytes)
        if self.ahead:
            # The slab holds no more than some layers' pages when a visit begins, the others come in meanwhile.
            rest = self.copies(work, layers - slab_slots(layers))
            return max(seconds, rest, host + (layers * self.launch_s if work.prefills else 0.0))
        return seconds + host + self.copies(work, layers)

    def host(self, work: Work, first: bool, last: bool, hidden_bytes: int) -> float:
        """What the host does for a visit beside its layers."""
        begun = work.sampled - work.decodes  # prompts that are followed by their first token
        seconds = self.plan(work.tokens) + self.request_s * begun if first else 0.0
        return seconds if first and last else seconds + self.frames(work.tokens * hidden_bytes)

    def copies(self, work: Work, layers: int) -> float:
        """Bringing in the visit's swap pages."""
        return layers * self.page_s * work.swapped

    def delay(self, work: Work, first: bool, last: bool, hidden_bytes: int) -> float:
        """How much later than a visit's frame arrives its work can begin, beside what keeps the rank busy."""
        return self.start_s + self.host(work, first, last, hidden_bytes) if self.ahead else 0.0

    def scaled(self, factor: float) -> "StageTimes":
        """`factor` times as many seconds of layers, output layer and sampler."""
        return replace(
            self, layer=self.layer.scaled(factor), visit=self.visit.scaled(factor), head=self.head.scaled(factor)
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "StageTimes":
        def curve(points: dict[str, Any]) -> Curve:
            return Curve(tuple(points["at"]), tuple(points["seconds"]))

        def cost(parts: dict[str, Any]) -> Cost:
            return Cost(**{**parts, "tokens": curve(parts["tokens"]), "decodes": curve(parts["decodes"])})

        parts = {name: cost(raw[name]) for name in ("layer", "visit")}
        curves = {name: curve(raw[name]) for name in ("head", "plan", "frames")}
        return StageTimes(**{**raw, **parts, **curves})


@dataclass(frozen=True)
class LinkTimes:
    """A link to the next rank: one-way latency in seconds, and seconds per byte."""

    latency_s: float = 0.0
    byte_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """The ranks in order and the links that leave them; `memory` is what each rank has for weights and KV pages.

    `hidden_bytes`: one token's hidden state on a link. `page_bytes`: one KV page of one layer. `graph_bytes`: the CUDA
    graphs of one layer. `receives_on_device`: frames of hidden states arrive in the memory of the stage. `budgets`:
    tokens of a visit that are worth a plan, up to as many as were measured.
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

    @property
    def ranks(self) -> int:
        return len(self.stages)

    @cached_property
    def latency_s(self) -> float:
        """Once round the ring, without any work."""
        return sum(link.latency_s for link in self.links) if self.ranks > 1 else 0.0

    def frame_bytes(self, work: Work, rank: int) -> float:
        """What a visit puts on the link that leaves `rank`: the plan and hidden states, or sampled tokens."""
        if rank == self.ranks - 1:
            return 16 + 4 * work.sampled
        return 72 + 16 * (work.decodes + work.sampled) + work.tokens * self.hidden_bytes


def stated_times(
    model: ModelConfig,
    dtype: torch.dtype,
    bytes_per_s: float,
    flops: float,
    layer_s: float | None,
    most_tokens: int,
    page_s: float = 0.0,
) -> StageTimes:
    """The roofline of a device that reads `bytes_per_s` and computes `flops` a second: each product takes the longer
    of reading its weights and multiplying. `layer_s`, where given, is what a layer takes however many its tokens.

    `page_s`: see StageTimes. Source: Williams, Waterman, Patterson, "Roofline", CACM 52 (2009).
    """

    def product(weight_bytes: int) -> Curve:
        knee = weight_bytes / bytes_per_s * flops / (2 * weight_bytes / dtype.itemsize)  # tokens
        end = max(float(most_tokens), 2 * knee)
        fixed = weight_bytes / bytes_per_s
        return Curve((0.0, knee, end), (fixed, fixed, fixed * end / knee))

    layer_bytes = parameter_bytes(model, Shard(0, 1, False, False), dtype)
    kv_s = model.kv_spec(dtype).token_bytes / bytes_per_s
    pair_s = 4 * model.q_size / flops / 2  # two products of two operations; causal: half of the pairs
    tokens = product(layer_bytes) if layer_s is None else Curve((0.0,), (layer_s,))
    head = product(model.vocab_size * model.hidden_size * dtype.itemsize)
    return StageTimes(Cost(tokens, kv_s=kv_s, pair_s=pair_s), head=head, page_s=page_s, ahead=True)
