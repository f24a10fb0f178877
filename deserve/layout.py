"""The layout of a run, as the planner decides it: layers and pages of each rank, and how much circulates."""

from dataclasses import dataclass
from typing import Any

from deserve.errors import UserError

READS = 8  # times the pages that a round can own, so many may the rows of a visit read, counted for each reader
BUDGETS = (512, 1024)  # tokens of a visit that are planned where none are stated, the second on GPUs alone


@dataclass(frozen=True)
class Shard:
    """What a stage holds: layers `first` to `last` (exclusive), the embedding, the output head."""

    first: int
    last: int
    embeds: bool
    outputs: bool


@dataclass(frozen=True)
class Layout:
    """The layout of a run; the same on every rank.

    `partition` holds the first layer of each rank; `concurrency` the sequences in flight; pages count per rank.
    Buffers and graphs are made for visits of `max_batch_tokens`; the first visits have `visit_tokens` at most.
    `predicted` is output tokens/s, None for a job too small to tell, and `bound` the resource that keeps it from being
    more; `hint` says what a setting that is never planned would bring there.
    """

    partition: tuple[int, ...]
    rounds: int
    micro_batch_size: int
    concurrency: int
    max_batch_tokens: int
    policy: str
    page_size: int
    main_pages: int
    swap_pages: int
    host_height: int  # the host pool holds 2^(height-1) pages; 0: none
    predicted: float | None = None
    bound: str = ""
    why: str = ""  # one sentence behind `bound`
    stage_s: tuple[float, ...] = ()  # seconds of a full decode visit, by rank
    hint: str = ""
    fp8_pages: bool = False
    visit_tokens: int = 0  # 0: as many as max_batch_tokens
    sliding_pages: int = 0  # of layers with a window, which then have none of the others; 0: they hold whole contexts
    window: int = 0  # tokens that those layers attend to

    def shard(self, rank: int, layers: int) -> Shard:
        """The share of `rank` of a model of `layers` layers."""
        last_rank = len(self.partition) - 1
        end = layers if rank == last_rank else self.partition[rank + 1]
        return Shard(self.partition[rank], end, embeds=rank == 0, outputs=rank == last_rank)

    def layer_pages(self, layers: int, sliding: int) -> int:
        """The KV memory of a rank of `layers` layers, `sliding` of them with sliding pages, in pages of one layer."""
        whole = layers - sliding
        return whole * self.main_pages + slab_slots(whole, self.rounds) * self.swap_pages + sliding * self.sliding_pages

    @property
    def visit_pages(self) -> int:
        """Pages that the rows of a visit read at most, a prefix page counted for each of its readers."""
        return READS * (self.main_pages + self.swap_pages)


def slab_slots(layers: int, rounds: int = 2) -> int:
    """Of how many of a stage's layers the swap slab has room for the pages: half of them.

    Of all for a single round, whose pages never leave. And not of one of two: a CUDA graph both gives up a layer's
    pages and awaits the next layer's, and what takes the place of the former comes in after its launch.
    """
    return layers if rounds == 1 else max(min(2, layers), -(-layers // 2))


def most_sliding(window: int, page_size: int) -> int:
    """Sliding pages that a sequence holds at most between two visits: those of the last `window` tokens, which begin
    and end anywhere in a page, and one for draft tokens."""
    return -(-window // page_size) + 2


def token_budgets(stated: Any, gpu: bool) -> tuple[int, ...]:
    """`pipeline.max_batch_tokens`, or the budgets worth a plan where it is `auto`, the smallest first."""
    if stated != "auto":
        return (int(stated),)
    return BUDGETS if gpu else BUDGETS[:1]


def parse_partition(value: Any, ranks: int, layers: int) -> tuple[int, ...]:
    """`pipeline.partition` as the first layer of each rank: `[emb, 20]` is (0, 20).

    Raises UserError unless there is one entry per rank and every rank gets at least one layer.
    """
    key = f"pipeline.partition={value}"
    if not isinstance(value, (list, tuple)) or not all(v == "emb" or type(v) is int for v in value):
        raise UserError(f"{key} must be auto or a list of first layers such as [emb,20,40,60]")
    firsts = tuple(0 if v == "emb" else int(v) for v in value)
    if len(firsts) != ranks:
        raise UserError(f"{key} has {len(firsts)} entries, but there are {ranks} ranks: give one first layer per rank")
    ends = (*firsts[1:], layers)
    if firsts[0] != 0 or any(first >= end for first, end in zip(firsts, ends, strict=True)):
        raise UserError(f"{key} must start at emb (or 0) and rise to less than {layers}, the model's layers")
    return firsts
