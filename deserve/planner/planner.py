"""Chooses the layer split, rounds, micro-batch size, concurrency, main and swap pages that finish a workload soonest.

N sequences in flight on S ranks of stage time t and link latency L give N / (S*(t+L)) tokens/s, until with
R*t = S*(t+L) no stage waits any more and the work itself sets the pace (DeServe, arXiv 2501.14784). P pages of KV
memory, with a slab that holds s swap pages of half the layers, hold (P - s/2) + R*s pages of sequences; a round's swap
pages must come in over the bus while another visit is computed. That arithmetic ranks all plans in reach; the best few
are simulated, and the best of those is taken.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch

from deserve.config import Config
from deserve.errors import UserError
from deserve.kvcache.buddy import pool_pages
from deserve.kvcache.layout import slab_slots
from deserve.model.config import ModelConfig
from deserve.model.weights import Shard, parameter_bytes
from deserve.planner.plan import Plan, parse_partition
from deserve.planner.simulator import WHOLE, simulate
from deserve.planner.times import Machine, StageTimes, Work
from deserve.workload import Lengths

SIMULATED = 6  # plans of each policy that are compared by simulation
ENOUGH_VISITS = 16_000  # simulated, after which no further plan is: one or two seconds
SCREENED = 3  # waves of a long job that are simulated to compare plans, before the best two are in full
CLOSE = 0.07  # behind the best so far, by which a plan may be and still be made bolder
# Visits that a search simulates before it ends with what it has: at least; for each second that the job may take, which
# is a twentieth of it; at most. 10,000 take about a second.
EFFORT = 30_000, 500, 200_000
PLANNED_POLICIES = ("prefill_first", "decode_first")  # vanilla only by hand: its visits are never fuller
MOST_ROUNDS = 512  # each needs receive buffers on every link
ENDLESS = 10**6  # requests of a workload that does not tell how many it has
CROWDS = (1.25, 1.6)  # times the sequences that pages hold
PACES = (0.75, 1.33, 0.87, 1.15)  # times a visit's token budget: steps in which others are tried, large ones first
EQUAL = 0.01  # plans this close are as good as each other: the one with fewer rounds is taken
WORTH = 0.03  # what a bolder plan must promise more, as predictions are not more exact
GB = 1e9

# Where two resources bind alike, the first named is the one to do something about.
REQUESTS, MEMORY, BUS, BANDWIDTH, LATENCY, COMPUTE = BOUNDS = (
    "too few requests",
    "KV memory",
    "the bus to host memory",
    "link bandwidth",
    "link latency",
    "compute",
)


def choose_plan(config: Config, model: ModelConfig, dtype: torch.dtype, lengths: Lengths, machine: Machine) -> Plan:
    """The plan for `lengths` on `machine`.

    What `config` sets by hand stays as it is. Raises UserError, naming the key, where that cannot work.
    """
    if model.num_layers < machine.ranks:
        raise UserError(f"{machine.ranks} ranks, but the model has only {model.num_layers} layers: start fewer ranks")
    stated = config.pipeline.max_batch_tokens
    smallest, *larger = machine.budgets if stated == "auto" else (int(stated),)
    search = _Search(config, model, dtype, lengths, machine, smallest)
    best = search.best()
    for budget in larger:
        wider = _Search(config, model, dtype, lengths, machine, budget)
        if wider.promise <= (1 + EQUAL) * search.promise:
            continue
        try:
            rival = wider.best()
        except UserError:  # its frames leave too little for pages
            continue
        best = rival if (rival.predicted or 0) > (1 + EQUAL) * (best.predicted or 0) else best
    return best


@dataclass(frozen=True)
class _Candidate:
    policy: str
    partition: tuple[int, ...]
    rounds: int
    size: int  # sequences in a micro-batch
    swap: int  # pages of each round
    tokens: int  # of a visit, at most


class _Found(NamedTuple):
    """What a simulation says of a plan."""

    candidate: _Candidate
    plan: Plan
    tokens_per_s: float
    visits: int


@dataclass(frozen=True)
class _Pace:
    """What the arithmetic says of a candidate; times in seconds, of a decode visit."""

    tokens_per_s: float
    rows: float  # sequences in a visit
    busiest: float  # the slowest rank
    trip: float  # once round the ring without waiting
    wire: float  # its frames on the busiest link
    copies: float  # bringing in its swap pages


class _Search:
    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        dtype: torch.dtype,
        lengths: Lengths,
        machine: Machine,
        budget: int,
    ):
        self._config, self._model, self._machine = config, model, machine
        self._lengths = lengths
        self._layer_bytes = parameter_bytes(model, Shard(0, 1, False, False), dtype)
        self._embedding_bytes = model.vocab_size * model.hidden_size * dtype.itemsize
        self._prompt, self._output = max(1.0, lengths.mean_prompt), max(1.0, lengths.mean_output)
        self._sequence_pages = -(-round(self._prompt + self._output - 1) // config.kvcache.page_size)
        self._limit = 10**9 if config.workload.concurrency == "auto" else config.workload.concurrency
        self._count = ENDLESS if lengths.count is None else max(1, lengths.count)
        # Sequences of all ages together hold less than each will at its end.
        self._mean_pages = max(1.0, (self._prompt + self._output / 2) / config.kvcache.page_size)
        self._budget = budget  # tokens of a visit
        self._longest = -(-min(lengths.max_total, model.max_context) // config.kvcache.page_size)
        self._alike = cache(self._kinds_of)
        self._simulated_visits = 0
        forward = [link.byte_s for link in machine.links[:-1]] or [0.0]
        self._forward_byte_s = max(forward), sum(forward)  # of the links that carry hidden states
        self._capacity = cache(self._pages_that_fit)

    @cached_property
    def promise(self) -> float:
        """Output tokens/s of the best plan by the arithmetic."""
        return max(self._paces.values(), default=0.0)

    @cached_property
    def _policies(self) -> tuple[str, ...]:
        policy = self._config.pipeline.policy
        return PLANNED_POLICIES if policy == "auto" else (policy,)

    @cached_property
    def _paces(self) -> dict[_Candidate, float]:
        """All plans in reach, and what the arithmetic promises of each."""
        reach = {
            _Candidate(policy, partition, rounds, min(size, most), swap, tokens)
            for policy in self._policies
            for rounds in self._rounds()
            for size in self._sizes(rounds)
            for partition in self._partitions(policy, size)
            for swap in self._swaps(policy, partition, rounds, size)
            for most in self._most_rows(partition, rounds, swap)
            for tokens in {self._budget, self._mixing(policy, min(size, most))}
        }
        candidates = sorted(reach, key=lambda c: (c.policy, c.partition, c.rounds, c.size, c.swap))
        return {candidate: self._pace(candidate).tokens_per_s for candidate in candidates}

    def best(self) -> Plan:
        paces, most = self._paces, self.promise
        if not paces:
            raise UserError(self._too_much_swapped())
        ranked = sorted(paces, key=lambda c: (int((1 - paces[c] / most) / EQUAL), c.rounds, c.size))
        screened = [self._screened([c for c in ranked if c.policy == policy]) for policy in self._policies]
        fastest = [_fastest(found).tokens_per_s for found in screened if found]
        if not fastest:
            self._plan(ranked[0])  # says why it does not fit
        close = [found for found in screened if found and _fastest(found).tokens_per_s >= (1 - CLOSE) * max(fastest)]
        best, *others = (self._best(found) for found in close)
        candidate, plan, rate, _ = _better(best, others)
        bound = self._bound([other for other in paces if other.policy == candidate.policy])
        return replace(
            plan,
            predicted=rate,
            bound=bound,
            why=self._why(bound, candidate, plan),
            stage_s=self._stages(plan.partition, self._decode(self._pace(candidate).rows)),
        )

    def _screened(self, ranked: list[_Candidate]) -> list[_Found]:
        """What a short simulation says of the first of `ranked`, none if none fits."""
        # Of those that differ in little else than their size the first, for `_crowded` tries others.
        alike: dict[tuple[Any, ...], _Candidate] = {}
        for candidate in ranked:
            paced = candidate.tokens < self._budget
            alike.setdefault((candidate.partition, candidate.rounds, candidate.swap > 0, paced), candidate)
        return self._simulated(islice(self._that_fit(alike.values()), SIMULATED), SCREENED)

    def _best(self, screened: list[_Found]) -> _Found:
        """The best of `screened` by simulation in full, or what is bolder and better."""
        first = sorted(screened, key=lambda found: -found.tokens_per_s)
        # The best with the whole budget and the best with a smaller one lead to different places.
        starts = [first[0], *(found for found in first if self._whole(found) != self._whole(first[0]))][:2]
        usual = [self._simulate(found.candidate, found.plan) for found in starts]
        most, bold = _fastest(usual).tokens_per_s, []
        for found in sorted(usual, key=lambda found: -found.tokens_per_s):
            if found.tokens_per_s >= (1 - CLOSE) * most:
                bold.append(self._longer(self._paced(self._crowded(found))))
        return _better(_chosen(usual), bold)

    @property
    def _goes_on(self) -> bool:
        """Whether there is time for further simulations."""
        least, each_second, most = EFFORT
        return self._simulated_visits < min(most, max(least, each_second * self._count * self._output / self.promise))

    def _whole(self, found: _Found) -> bool:
        """Whether its visits may have as many tokens as any."""
        return found.candidate.tokens == self._budget

    def _that_fit(self, candidates: Iterable[_Candidate]) -> Iterator[tuple[_Candidate, Plan]]:
        """Those of `candidates` that leave room for their pages, in full: the frames of many rounds take some too."""
        for candidate in candidates:
            try:
                plan = self._plan(candidate)
            except UserError:
                continue
            yield candidate, plan

    def _simulated(self, plans: Iterable[tuple[_Candidate, Plan]], whole: int = WHOLE) -> list[_Found]:
        """What a simulation of `whole` waves says of `plans`, as far as they can be simulated in a short time."""
        found: list[_Found] = []
        for candidate, plan in plans:
            found.append(self._simulate(candidate, plan, whole))
            if len(found) > 1 and sum(each.visits for each in found) > ENOUGH_VISITS:
                break
        return found

    def _simulate(self, candidate: _Candidate, plan: Plan, whole: int = WHOLE) -> _Found:
        outcome = simulate(plan, self._lengths, self._machine, self._model.num_layers, whole)
        self._simulated_visits += outcome.visits
        return _Found(candidate, plan, outcome.tokens_per_s, outcome.visits)

    def _crowded(self, found: _Found) -> _Found:
        """`found` with more sequences than its pages hold of all ages, so that some are suspended now and then.

        Sequences that began together are young together: their pages hold more of them then, and fewer later on.
        """
        if self._config.pipeline.micro_batch_size != "auto":
            return found
        most = min(self._budget, self._share(found.candidate.rounds))
        sizes = dict.fromkeys(min(most, round(crowd * found.candidate.size)) for crowd in CROWDS)
        crowded = [replace(found.candidate, size=size) for size in sizes if size > found.candidate.size]
        return _fastest([found, *self._simulated(self._that_fit(crowded if self._goes_on else []))])

    def _paced(self, found: _Found) -> _Found:
        """`found` with a smaller or a larger token budget than the arithmetic has for it."""
        if found.candidate.policy != "decode_first" or self._config.pipeline.max_batch_tokens != "auto":
            return found
        if not self._lengths.exact:
            return found
        for step in PACES:
            tokens = round(step * found.candidate.tokens)
            while self._goes_on and found.candidate.size <= tokens <= self._budget:
                candidate = replace(found.candidate, tokens=tokens)
                paced = self._simulate(candidate, replace(found.plan, max_batch_tokens=tokens))
                if paced.tokens_per_s <= found.tokens_per_s:
                    break
                found, tokens = paced, round(step * tokens)
        return found

    def _longer(self, found: _Found) -> _Found:
        """`found` with more rounds, as visits of fewer tokens are shorter."""
        rounds = found.candidate.rounds
        if self._config.pipeline.rounds != "auto" or self._whole(found):
            return found
        while self._goes_on and (rounds := rounds + max(1, rounds // 8)) <= min(MOST_ROUNDS, self._count, self._limit):
            if found.candidate.swap > self._host_pages(found.candidate.partition, rounds):
                break
            candidate = replace(found.candidate, rounds=rounds)
            longer = self._simulated(self._that_fit([candidate]))
            if not longer or longer[0].tokens_per_s <= (1 + EQUAL) * found.tokens_per_s:
                break
            (found,) = longer
        return found

    # -- what is in reach

    def _rounds(self) -> list[int]:
        """Numbers of rounds worth a look: up to those that fill the ring when every visit is as short as can be."""
        if self._config.pipeline.rounds != "auto":
            return [self._config.pipeline.rounds]
        ranks = self._machine.ranks
        stages = self._stages(self._even(), Work(1, self._prompt, 0, 0, 1))
        enough = int((sum(stages) + self._machine.latency_s) / max(*stages, 1e-9)) + ranks
        most = max(1, min(MOST_ROUNDS, enough, self._count, self._limit))
        steps = {1, 2, 3, 4, 6, ranks, ranks + 1, 2 * ranks, most}
        step = float(ranks)
        while step < most:
            steps.add(round(step))
            step *= 1.25
        return sorted(rounds for rounds in steps if rounds <= most)

    def _share(self, rounds: int) -> int:
        """Requests in flight of each of `rounds`, were all in flight at once."""
        return -(-min(self._count, self._limit) // rounds)

    def _sizes(self, rounds: int) -> list[int]:
        """Micro-batch sizes worth a look."""
        pipeline = self._config.pipeline
        if pipeline.micro_batch_size != "auto":
            return [pipeline.micro_batch_size]
        share = self._share(rounds)
        most = min(share, self._budget)
        swap = self._config.kvcache.swap_pages
        by_hand = 0 if swap == "auto" else swap
        held = self._main_pages(self._even(), rounds, by_hand) / rounds + by_hand
        steps = {most, int(held / self._sequence_pages), int(held / self._mean_pages)}
        steps |= {share // waves for waves in (2, 3, 4)}
        steps |= {size * 2**power for power in range(12) for size in (1, 3)}
        return sorted(size for size in steps if 1 <= size <= most)

    def _mixing(self, policy: str, rows: float) -> int:
        """The largest token budget of visits under which prompts and answers of `rows` sequences mix for good.

        Under `decode_first`, with budgets of B tokens and prompts of P, (B - k) / P sequences begin in a visit in which
        k others decode. So by the time the first answers of O tokens end, O visits later, k = B * (1 - exp(-O / P)) do.
        A micro-batch with room for so many goes on beginning as many as end. With less room for its budget all would
        begin, then all answer, together for ever, and each kind of visit leave something idle that the other would use.
        """
        if policy != "decode_first" or self._config.pipeline.max_batch_tokens != "auto" or not self._lengths.exact:
            return self._budget  # answers that end early mix by themselves
        return max(math.ceil(rows), min(self._budget, math.ceil(rows / -math.expm1(-self._output / self._prompt))))

    def _too_much_swapped(self) -> str:
        """Why no plan has as many swap pages as are set by hand."""
        swap, rounds = self._config.kvcache.swap_pages, min(self._rounds())
        layers = max(self._shares(self._even()))
        gigabytes = rounds * swap * self._machine.page_bytes * layers / GB
        return (
            f"kvcache.swap_pages={swap} of {rounds} rounds take {gigabytes:.3f} GB of host memory for {layers} layers, "
            f"but a rank has {self._machine.host_memory / GB:.3f} GB: set fewer"
        )

    def _most_rows(self, partition: tuple[int, ...], rounds: int, swap: int) -> list[int]:
        """How many sequences a round's pages hold: of all ages, and while they are young.

        With more than the latter some would always be suspended.
        """
        if self._config.pipeline.micro_batch_size != "auto":
            return [self._config.pipeline.micro_batch_size]
        pages = self._main_pages(partition, rounds, swap) / rounds + swap
        young = 1 + (self._prompt + self._output / 8) / self._config.kvcache.page_size
        return [max(1, int(pages / each)) for each in (self._mean_pages, young)]

    def _swaps(self, policy: str, partition: tuple[int, ...], rounds: int, size: int) -> list[int]:
        """Numbers of swap pages worth a look: none, and what the micro-batch is short of, as far as the bus allows.

        The slab's pages come in while the visit before is computed, or while the ring has nothing for this rank.
        """
        machine, shares, kv = self._machine, self._shares(partition), self._config.kvcache
        host = self._host_pages(partition, rounds)
        if kv.swap_pages != "auto":
            return [kv.swap_pages] if kv.swap_pages <= host or rounds == 1 else []
        wanted = min(size, -(-self._count // rounds)) * self._mean_pages
        pages = self._capacity(partition, rounds)
        main = self._main_pages(partition, rounds, 0)
        short = wanted - main / rounds
        slab = max(slab_slots(layers) / layers for layers in shares)  # pages of memory for each swap page
        if rounds == 1 or short <= 0 or pages <= 0:
            return [0]
        pace = self._pace(_Candidate(policy, partition, rounds, size, 0, self._mixing(policy, size)), rows=float(size))
        turn = max(pace.busiest, pace.trip / rounds)
        page_s = max(machine.stages[rank].page_s * layers for rank, layers in enumerate(shares))
        most = min(int(turn / page_s) if page_s else pages, host)
        if kv.main_pages == "auto":
            swap = min(int(short / (1 - slab / rounds)), most, int(pages / 2 / slab))
        else:
            swap = max(0, min(int(short), most, int((pages - kv.main_pages) / slab)))
        return sorted({0, swap // 2, 3 * swap // 4, swap})

    def _host_pages(self, partition: tuple[int, ...], rounds: int) -> int:
        """As many swap pages of each of `rounds` does host memory hold."""
        each = [self._machine.page_bytes * layers * rounds for layers in self._shares(partition)]
        return min(self._machine.host_memory // nbytes for nbytes in each)

    def _partitions(self, policy: str, size: int) -> list[tuple[int, ...]]:
        """Layer splits worth a look: ranks that take equally long, and ranks whose pages last equally long."""
        set_by_hand = self._config.pipeline.partition
        if set_by_hand != "auto":
            return [parse_partition(set_by_hand, self._machine.ranks, self._model.num_layers)]
        kinds = self._kinds(policy, float(size), self._count > size, self._mixing(policy, size))
        machine, last = self._machine, self._machine.ranks - 1

        def seconds(rank: int, layers: int) -> float:
            times, ends = machine.stages[rank], (rank == 0, rank == last)
            return sum(visits * times.seconds(work, layers, *ends, machine.hidden_bytes) for visits, work in kinds)

        def scarcity(rank: int, layers: int) -> float:
            pages = self._pages_of(rank, layers, self._machine.ranks)
            return 1 / pages if pages > 0 else float(layers)

        splits = {self._spread(seconds), self._spread(scarcity)}
        return sorted(
            split for split in splits if self._capacity(split, self._machine.ranks) >= self._sequence_pages
        ) or [self._even()]

    def _spread(self, cost: Callable[[int, int], float]) -> tuple[int, ...]:
        """Give out layers one by one, each to the rank that it costs least to have one more."""
        shares = [1] * self._machine.ranks
        heap = [(cost(rank, 2), rank) for rank in range(self._machine.ranks)]
        heapq.heapify(heap)
        for _ in range(self._model.num_layers - len(shares)):
            rank = heap[0][1]
            shares[rank] += 1
            heapq.heapreplace(heap, (cost(rank, shares[rank] + 1), rank))
        return tuple(sum(shares[:rank]) for rank in range(len(shares)))

    def _even(self) -> tuple[int, ...]:
        layers, ranks = self._model.num_layers, self._machine.ranks
        return tuple(round(rank * layers / ranks) for rank in range(ranks))

    # -- memory

    def _shares(self, partition: tuple[int, ...]) -> list[int]:
        """Layers of each rank."""
        return [end - first for first, end in zip(partition, (*partition[1:], self._model.num_layers), strict=True)]

    def _kv_bytes(self, rank: int, layers: int, rounds: int) -> float:
        """What `rank` has left for pages beside the weights of `layers` layers and the frames of all rounds."""
        ends = (rank == 0) + (rank == self._machine.ranks - 1)
        if self._machine.ranks == 1 and self._model.tied_embeddings:
            ends = 1
        left = self._machine.memory[rank] - ends * self._embedding_bytes
        left -= layers * (self._layer_bytes + self._machine.graph_bytes)
        if self._machine.receives_on_device and rank:
            left -= (rounds + 1) * self._budget * self._machine.hidden_bytes
        cap = self._config.kvcache.gpu_memory_gb
        return left if cap is None else min(left, cap * GB)

    def _pages_of(self, rank: int, layers: int, rounds: int, swap: int = 0) -> int:
        """Main pages for which `rank` has room beside the slab of `swap` pages."""
        left = self._kv_bytes(rank, layers, rounds) / self._machine.page_bytes
        return int((left - swap * slab_slots(layers, rounds)) // layers)

    def _pages_that_fit(self, partition: tuple[int, ...], rounds: int, swap: int = 0) -> int:
        """The same of the rank that can hold the fewest under this split."""
        return min(self._pages_of(rank, layers, rounds, swap) for rank, layers in enumerate(self._shares(partition)))

    def _main_pages(self, partition: tuple[int, ...], rounds: int, swap: int) -> int:
        """Main pages beside a slab of `swap`: what is left, or what is set by hand."""
        left = max(0, self._capacity(partition, rounds, swap))
        by_hand = self._config.kvcache.main_pages
        return left if by_hand == "auto" else min(left, by_hand)

    def _plan(self, candidate: _Candidate) -> Plan:
        """`candidate` in full. Raises UserError where its pages do not fit, or not even a sequence fits its pages."""
        kv = self._config.kvcache
        shares = self._shares(candidate.partition)
        pages = [self._pages_of(rank, layers, candidate.rounds) for rank, layers in enumerate(shares)]
        rank = min(range(len(pages)), key=pages.__getitem__)
        free = max(0.0, self._kv_bytes(rank, shares[rank], candidate.rounds))
        has = (
            f"rank {rank} has {free / GB:.3f} GB for the KV cache of its {shares[rank]} layers, "
            f"which is {max(0, pages[rank])} pages of {kv.page_size} tokens"
        )
        cap = "" if kv.gpu_memory_gb is None else f" (kvcache.gpu_memory_gb={kv.gpu_memory_gb})"
        swap = candidate.swap
        asked = 0 if kv.main_pages == "auto" else kv.main_pages
        room = self._pages_that_fit(candidate.partition, candidate.rounds, swap)
        if (asked or swap) and asked > room:
            layers = shares[rank]
            slab = swap * slab_slots(layers, candidate.rounds)
            gigabytes = (asked * layers + slab) * self._machine.page_bytes / GB
            keys = f"kvcache.main_pages={kv.main_pages} and kvcache.swap_pages={kv.swap_pages}"
            raise UserError(f"{keys} take {gigabytes:.3f} GB, but {has}{cap}")
        concurrency = max(1, min(self._count, self._limit, candidate.rounds * candidate.size))
        # A little more than they hold at their longest: admission keeps that much free. And a request that is longer
        # than all of the sample must not fail for want of memory that is there.
        wanted = concurrency * self._longest + -(-2 * candidate.size // kv.page_size) + 1
        wanted = max(wanted, -(-self._model.max_context // kv.page_size))
        main = min(room, wanted)
        main = main if kv.main_pages == "auto" else kv.main_pages
        if main + swap < self._sequence_pages:
            what = f"kvcache.main_pages={main}" if kv.main_pages != "auto" else f"kvcache.main_pages=auto: {has}{cap}"
            raise UserError(
                f"{what}; too few for one request of this workload, which needs {self._sequence_pages} "
                f"({self._prompt:.0f} tokens of prompt and {self._output:.0f} of answer)"
            )
        # A pool for all that the GPU cannot hold, should every sequence grow to its end, and for two more.
        useful = max(0, concurrency * self._longest - main - candidate.rounds * swap) + 2 * self._longest
        page_bytes = self._machine.page_bytes * max(shares)
        left = self._machine.host_memory - candidate.rounds * swap * page_bytes
        height = min(kv.buddy_height, useful.bit_length() + 1)
        while height and pool_pages(height) * page_bytes > left:
            height -= 1
        return Plan(
            partition=candidate.partition,
            rounds=candidate.rounds,
            micro_batch_size=candidate.size,
            concurrency=concurrency,
            max_batch_tokens=candidate.tokens,
            policy=candidate.policy,
            page_size=kv.page_size,
            main_pages=main,
            swap_pages=swap,
            host_height=height,
        )

    # -- the arithmetic

    def _decode(self, rows: float) -> Work:
        """A visit in which `rows` sequences, half way through their answers, get a token each."""
        return Work(rows, rows * (self._prompt + self._output / 2), 0, 0, rows)

    def _kinds(self, policy: str, rows: float, mixes: bool, budget: int) -> list[tuple[float, Work]]:
        """The visits that take a micro-batch of `rows` from prompts to the ends of answers, as numbers of each kind.

        A visit has `budget` tokens. `decode_first` spreads prompts over the answers of others, if it `mixes` the two;
        otherwise one is done, then the other.
        """
        context = self._prompt + self._output / 2
        prompts, answers = rows * self._prompt, rows * (self._output - 1)
        if policy == "decode_first" and mixes:
            visits = max(self._output, (prompts + answers) / budget)
            n, p = answers / visits, prompts / visits
            return [(visits, Work(n, n * context, p, p * self._prompt, rows / visits + n))]
        fills = max(1.0, prompts / (min(budget, self._prompt) if policy == "vanilla" else budget))
        p, n = prompts / fills, min(rows, budget)
        kinds = [(fills, Work(0, 0, p, p * min(self._prompt, budget), rows / fills))]
        return [*kinds, (answers / n, Work(n, n * context, 0, 0, n))] if answers else kinds

    def _kinds_of(self, partition: tuple[int, ...]) -> list[tuple[StageTimes, int, bool, bool, int]]:
        """Ranks that are alike, once: their times and layers, whether first, whether last, and how many they are."""
        last = self._machine.ranks - 1
        found: Counter[tuple[StageTimes, int, bool, bool]] = Counter(
            (self._machine.stages[rank], layers, rank == 0, rank == last)
            for rank, layers in enumerate(self._shares(partition))
        )
        return [(*kind, number) for kind, number in found.items()]

    def _stages(self, partition: tuple[int, ...], work: Work) -> tuple[float, ...]:
        """Seconds of a visit on each rank."""
        machine, last = self._machine, self._machine.ranks - 1
        return tuple(
            machine.stages[rank].seconds(work, layers, rank == 0, rank == last, machine.hidden_bytes)
            for rank, layers in enumerate(self._shares(partition))
        )

    def _pace(self, candidate: _Candidate, doubled: str = "", rows: float | None = None) -> _Pace:
        """The rate at which `candidate` goes through full waves of sequences, were the resource `doubled` doubled.

        `rows` of a visit are as many as memory holds, unless they are given.

        A wave fills the micro-batches with prompts, then takes them through their answers.
        """
        machine, policy = self._machine, candidate.policy
        count = self._count * (2 if doubled == REQUESTS else 1)
        main = self._main_pages(candidate.partition, candidate.rounds, candidate.swap)
        main += self._capacity(candidate.partition, candidate.rounds) if doubled == MEMORY else 0
        pages = main / candidate.rounds + candidate.swap
        if rows is None:
            rows = min(candidate.size, pages / self._mean_pages, self._limit / candidate.rounds)
        rows = max(rows, 1e-9)
        waves = max(1.0, count / (candidate.rounds * rows))
        rows = min(rows, count / candidate.rounds)
        rounds = candidate.rounds * min(1.0, rows)  # those that have a sequence at all
        rows = max(1.0, rows)
        mixes = waves > 1 and candidate.tokens <= self._mixing(policy, rows)
        kinds = self._kinds(policy, rows, mixes, candidate.tokens)
        speed, latency, wire, bus = (0.5 if doubled == what else 1.0 for what in (COMPUTE, LATENCY, BANDWIDTH, BUS))
        swapped = min(candidate.swap, rows * self._mean_pages) if candidate.rounds > 1 else 0.0
        last, hidden_bytes = machine.ranks - 1, machine.hidden_bytes
        total = busiest = trip = frame = copies = 0.0
        for visits, work in kinds:
            work = work._replace(swapped=swapped)
            alike = self._alike(candidate.partition)
            seconds = [
                (speed * times.seconds(work, layers, first, final, hidden_bytes), number)
                for times, layers, first, final, number in alike
            ]
            copies = bus * max(times.copies(work, layers) for times, layers, *_ in alike)
            busiest = max(took for took, _ in seconds)
            forward, back = wire * machine.frame_bytes(work, 0), wire * machine.frame_bytes(work, last)
            frame = max(forward * self._forward_byte_s[0], back * machine.links[last].byte_s)
            trip = sum(took * number for took, number in seconds) + latency * machine.latency_s
            trip += sum(times.delay(work, first, final, hidden_bytes) * n for times, _, first, final, n in alike)
            trip += forward * self._forward_byte_s[1] + back * machine.links[last].byte_s
            total += visits * max(rounds * max(busiest, frame, copies), trip)
        # The last wave may be a small one, and takes its time nevertheless; what binds is seen without it.
        whole = waves if doubled else -(-waves // 1)
        rate = rounds * rows * self._output / total * waves / whole
        return _Pace(rate, rows, busiest, trip, frame, copies)

    def _bound(self, candidates: list[_Candidate]) -> str:
        """The resource of which twice as much would help most."""

        larger = [
            replace(candidate, size=2 * candidate.size, tokens=self._mixing(candidate.policy, 2 * candidate.size))
            for candidate in candidates
        ]
        if self._config.pipeline.micro_batch_size != "auto":
            larger = []

        def gain(resource: str) -> float:
            reach = [*candidates, *larger] if resource in (REQUESTS, MEMORY) else candidates
            return max(self._pace(candidate, resource).tokens_per_s for candidate in reach)

        gains = {resource: gain(resource) for resource in BOUNDS}
        return next(resource for resource in BOUNDS if gains[resource] >= (1 - EQUAL) * max(gains.values()))

    def _why(self, bound: str, candidate: _Candidate, plan: Plan) -> str:
        """One sentence of arithmetic behind `bound`."""
        pace, rounds = self._pace(candidate), candidate.rounds
        trip = f"a trip round the ring takes {1e3 * pace.trip:.1f} ms"
        work = f"{rounds} visits keep the slowest rank busy for {1e3 * rounds * pace.busiest:.1f} ms"
        if bound == COMPUTE:
            return f"{work}, and {trip}"
        if bound == LATENCY:
            return f"{trip}, {1e3 * self._machine.latency_s:.1f} ms of it latency, but {work}"
        if bound == BANDWIDTH:
            return f"a visit keeps the busiest link occupied for {1e3 * pace.wire:.1f} ms, a rank for less"
        if bound == BUS:
            return (
                f"the swap pages of a visit take {1e3 * pace.copies:.1f} ms to come in, "
                f"its work {1e3 * pace.busiest:.1f} ms; {trip}"
            )
        if bound == MEMORY:
            fit = (plan.main_pages + rounds * plan.swap_pages) / self._mean_pages
            return f"the pages hold {fit:.0f} sequences of all ages, {fit / rounds:.1f} a round; {trip}"
        return f"{self._count} requests are {pace.rows:.1f} a round; {trip}, and {work}"


def _fastest(found: list[_Found]) -> _Found:
    return max(found, key=lambda each: each.tokens_per_s)


def _better(best: _Found, found: list[_Found]) -> _Found:
    """`best`, or the best of `found` if that promises enough more."""
    rival = _chosen([best, *found])
    return rival if rival.tokens_per_s > (1 + WORTH) * best.tokens_per_s else best


def _chosen(found: list[_Found]) -> _Found:
    """The best; of those that are as good as it, the one with the fewest rounds."""
    most = max(each.tokens_per_s for each in found)
    good = [each for each in found if each.tokens_per_s >= (1 - EQUAL) * most]
    return min(good, key=lambda each: (each.plan.rounds, -each.tokens_per_s))


def table(plan: Plan, layers: int, exact: bool = True) -> str:
    """`plan` for the eye: a line per rank (alike ones together), then what circulates and what to expect.

    Where answers may end before their `max_tokens`, they are not `exact`.
    """
    lines = ["rank      layers  first  stage ms"]
    shares = [plan.shard(rank, layers) for rank in range(len(plan.partition))]
    for rank, share in enumerate(shares):
        seconds = f"{1e3 * plan.stage_s[rank]:8.2f}" if plan.stage_s else " " * 8
        lines.append(f"{rank:<8}  {share.last - share.first:6}  {share.first:5}  {seconds}")
    if len(lines) > 17:
        widths = Counter(share.last - share.first for share in shares)
        spread = ", ".join(f"{number} ranks of {width}" for width, number in sorted(widths.items()))
        lines = [*lines[:4], f"... {len(shares) - 4} more ...", lines[-1], f"layers: {spread}"]
    lines.append(
        f"{plan.rounds} rounds of {plan.micro_batch_size} sequences, {plan.concurrency} in flight, "
        f"up to {plan.max_batch_tokens} tokens a visit, policy {plan.policy}"
    )
    swapping = f"{plan.swap_pages} swap pages for each round" if plan.swap_pages else "no swapping"
    pool = f"a host pool of {pool_pages(plan.host_height)}" if plan.host_height else "no host pool"
    lines.append(f"KV memory of {plan.main_pages} main pages of {plan.page_size} tokens, {swapping}, {pool}")
    if plan.predicted is not None:
        condition = "" if exact else " if all answers are as long as max_tokens allows (less if they end earlier)"
        lines.append(f"predicted {plan.predicted:,.1f} output tokens/s{condition}, bound by {plan.bound}: {plan.why}")
    return "\n".join(lines)
