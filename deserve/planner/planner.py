"""Chooses the layer split, rounds, micro-batch size, concurrency, main and swap pages that finish a workload soonest.

N sequences in flight on S ranks of stage time t and link latency L give N / (S*(t+L)) tokens/s, until with
R*t = S*(t+L) no stage waits any more and the work itself sets the pace (DeServe, arXiv 2501.14784). P pages of KV
memory, with a slab that holds s swap pages of half the layers, hold (P - s/2) + R*s pages of sequences; a round's swap
pages must come in over the bus while another visit is computed. That arithmetic ranks all candidates; the best few are
simulated, and the best of those is improved step by step. Budgets and sizes are then tuned while the job runs
(`deserve.tuner`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from deserve.batch import IntArray
from deserve.config import Config
from deserve.errors import UserError
from deserve.kvcache.buddy import pool_pages
from deserve.layout import Layout, Shard, most_sliding, parse_partition, slab_slots
from deserve.model.config import ModelConfig
from deserve.model.weights import parameter_bytes
from deserve.planner.simulator import Outcome, read_once, simulate
from deserve.planner.split import FloatArray, best_split
from deserve.planner.times import Cycle, Machine, Stages, StageTimes, VisitLoad, outside
from deserve.workload import Lengths

SIMULATED = 5  # candidates of each policy that are simulated
SCREENED = 3, 500  # waves of a long job and visits of such a simulation; the best are simulated in full
FINALISTS = 2
# Visits that a search simulates before it ends with what it has: at least; for each second that the job may take; at
# most. 1,000 take about 0.3 s.
EFFORT = 1_000, 100, 30_000
PLANNED_POLICIES = ("prefill_first", "decode_first")  # vanilla only by hand: its visits are never fuller
MOST_ROUNDS = 512  # each needs receive buffers on every link
ENDLESS = 10**6  # requests of a workload that does not tell how many it has
SWAP_PARTS = 5  # of the swap pages that a micro-batch is short of, so many are tried
STEPS = (0.75, 1.33)  # in which a finalist's token budget and size are changed
EQUAL = 0.01  # candidates this close are as good as each other: the one with fewer rounds is taken
# A job is too small for a prediction if its tail, in which most sequences have ended, is longer than this fraction of
# it, or if its answers may end early and it has fewer waves of sequences than this.
LONG_TAIL, FEW_WAVES = 0.2, 4
WORTH_IT = 1.05  # times the throughput: what to change for it is mentioned
GAIN = 0.8  # of twice the time for twice the sequences: with less, more sequences would help
GB = 1e9

REQUESTS, MEMORY, BUS, BANDWIDTH, LATENCY, COMPUTE = (
    "too few requests",
    "KV memory",
    "the bus to host memory",
    "link bandwidth",
    "link latency",
    "compute",
)


def choose_plan(
    config: Config, model: ModelConfig, dtype: torch.dtype, lengths: Lengths, machine: Machine
) -> tuple[Layout, float]:
    """The plan for `lengths` on `machine`, and its output tokens/s in the simulation.

    What `config` sets by hand stays as it is. Raises UserError, naming the key, where that cannot work.
    """
    return _Search(config, model, dtype, lengths, machine).best()


@dataclass(frozen=True)
class _Candidate:
    policy: str
    partition: tuple[int, ...]
    rounds: int
    size: int  # sequences in a micro-batch
    swap: int  # pages of each round
    tokens: int  # of a visit, at most: what buffers and graphs are made for
    begins: int  # of a visit, at first


class _Found(NamedTuple):
    """What a simulation says of a candidate."""

    candidate: _Candidate
    layout: Layout
    outcome: Outcome

    @property
    def rate(self) -> float:
        return self.outcome.tokens_per_s


class _Pace(NamedTuple):
    """What the arithmetic says of a candidate."""

    tokens_per_s: float
    rows: float  # sequences in a visit
    cycle: Cycle  # of a decode visit


class _Search:
    def __init__(self, config: Config, model: ModelConfig, dtype: torch.dtype, lengths: Lengths, machine: Machine):
        if model.num_layers < machine.ranks:
            raise UserError(
                f"{machine.ranks} ranks, but the model has only {model.num_layers} layers: start fewer ranks"
            )
        self._config, self._model, self._dtype, self._machine = config, model, dtype, machine
        self._lengths = lengths
        layers = (Shard(layer, layer + 1, False, False) for layer in range(model.num_layers))
        each = [parameter_bytes(model, layer, dtype) for layer in layers]
        self._bytes_before = np.array([*accumulate(each, initial=0)])  # of layers before each, and of all
        slides = [layer in model.sliding(0, model.num_layers) for layer in range(model.num_layers)]
        self._sliding_before = np.array([*accumulate(slides, initial=0)])
        self._embedding_bytes = model.vocab_size * model.hidden_size * dtype.itemsize
        self._prompt, self._output = max(1.0, lengths.mean_prompt), max(1.0, lengths.mean_output)
        self._sequence_pages = -(-round(self._prompt + self._output - 1) // config.kvcache.page_size)
        self._computed = max(1.0, lengths.mean_computed)
        self._count = ENDLESS if lengths.sequences is None else max(1, lengths.sequences)
        concurrency = config.workload.concurrency
        self._most = self._count if concurrency == "auto" else min(self._count, concurrency)  # requests in flight
        # Sequences of all ages together hold less than each will at its end; readers divide what they share.
        self._mean_pages = max(1.0, (self._computed + self._output / 2) / config.kvcache.page_size)
        stated = config.pipeline.max_batch_tokens
        self._budgets = machine.budgets if stated == "auto" else (int(stated),)
        self._longest = -(-min(lengths.max_total, model.max_context) // config.kvcache.page_size)
        # Sliding pages beside each main or swap page: what is reserved for a sequence, by what it holds of those.
        self._most_sliding = most_sliding(model.window, config.kvcache.page_size)
        beside = min(self._most_sliding, self._sequence_pages) / self._mean_pages
        self._beside = beside if model.window and beside < 1 else 0.0  # 0: contexts are no longer than windows
        if self._beside:
            self._machine = replace(machine, stages=tuple(replace(times, sliding=True) for times in machine.stages))
        self._simulated_visits, self._effort = 0, EFFORT[2]
        self._capacity, self._widest = cache(self._pages_that_fit), cache(self._split_of_memory)
        self._splits = cache(self._best_splits)
        self._stages = cache(lambda partition: Stages(self._machine, partition, model.num_layers))
        policy = config.pipeline.policy
        self._policies = PLANNED_POLICIES if policy == "auto" else (policy,)

    def _candidates(self) -> set[_Candidate]:
        """All candidates worth a look."""
        return {
            _Candidate(policy, partition, rounds, min(size, most), swap, tokens, tokens)
            for tokens in self._budgets
            for policy in self._policies
            for rounds in self._rounds()
            for size in self._sizes(rounds, tokens)
            for partition in self._partitions(policy, size, tokens)
            for swap in self._swaps(partition, rounds, size, tokens)
            for most in self._most_rows(partition, rounds, swap, tokens)
        }

    def _rates(self) -> dict[_Candidate, float]:
        """Output tokens/s of all candidates by the arithmetic."""
        return {candidate: self._pace(candidate).tokens_per_s for candidate in self._candidates()}

    def _ranked(self, rates: dict[_Candidate, float]) -> list[_Candidate]:
        """Those of `rates`, the fastest first; of those as good as each other, the one with the shortest visits."""
        most = max(rates.values())
        behind = {candidate: int((1 - rate / most) / EQUAL) for candidate, rate in rates.items()}
        return sorted(rates, key=lambda c: (behind[c], c.tokens, c.rounds, c.size, c.policy, c.partition, c.swap))

    def _fitting(self, candidates: Iterable[_Candidate]) -> Iterator[tuple[_Candidate, Layout]]:
        """Those of `candidates` whose pages and frames fit. Raises UserError where those of none do."""
        some, refused = False, None
        for candidate in candidates:
            try:
                layout = self._layout(candidate)
            except UserError as error:
                refused = refused or error
                continue
            some = True
            yield candidate, layout
        if refused and not some:
            raise refused

    def best(self) -> tuple[Layout, float]:
        rates = self._rates()
        most = max(rates.values())
        least, each_second, limit = EFFORT
        self._effort = min(limit, max(least, int(each_second * self._count * self._output / most)))
        ranked = self._ranked(rates)
        screened = [found for policy in self._policies for found in self._screened(ranked, policy)]
        screened.sort(key=lambda found: -found.rate)
        finalists = [self._simulate(found.candidate, found.layout) for found in screened[:FINALISTS]]
        good = [found for found in finalists if found.rate >= (1 - EQUAL) * max(each.rate for each in finalists)]
        best = self._climb(min(good, key=lambda found: (found.layout.rounds, -found.rate)))
        bound = self._bound(best.candidate)
        layout = replace(
            best.layout,
            predicted=best.rate if self._predictable(best) else None,
            bound=bound,
            why=self._why(bound, best.candidate, best.layout),
            hint=self._hint(bound, most),
            stage_s=tuple(self._decode(best.candidate.partition, self._pace(best.candidate).rows)),
        )
        return layout, best.rate

    def _screened(self, ranked: list[_Candidate], policy: str) -> Iterator[_Found]:
        """What short simulations say of the first of `ranked` that fit and differ in more than their size."""
        seen: set[tuple[object, ...]] = set()

        def kind(candidate: _Candidate) -> tuple[object, ...]:
            return candidate.partition, candidate.rounds, candidate.swap > 0, candidate.tokens

        unlike = (each for each in ranked if each.policy == policy and kind(each) not in seen)
        for candidate, layout in islice(self._fitting(unlike), SIMULATED):
            if seen and not self._goes_on:
                return
            seen.add(kind(candidate))
            yield self._simulate(candidate, layout, *SCREENED)

    @property
    def _goes_on(self) -> bool:
        """Whether there is time for further simulations."""
        return self._simulated_visits < self._effort

    def _simulate(self, candidate: _Candidate, layout: Layout, *extent: int) -> _Found:
        outcome = simulate(layout, self._lengths, self._machine, self._model.num_layers, *extent)
        self._simulated_visits += outcome.visits
        return _Found(candidate, layout, outcome)

    def _climb(self, found: _Found) -> _Found:
        """`found`, improved step by step as long as that pays."""
        better: _Found | None = found
        while better is not None:
            found = better
            better = next((each for each in self._neighbours(found) if each.rate > (1 + EQUAL) * found.rate), None)
        return found

    def _neighbours(self, found: _Found) -> Iterator[_Found]:
        """Simulations of `found` with another token budget, more sequences, more rounds."""
        candidate, pipeline = found.candidate, self._config.pipeline
        near: list[_Candidate] = []
        # Sequences that begin together end together: with a large budget prompts and answers alternate for ever, and
        # each kind of visit leaves something idle that the other would use. Answers that end early mix by themselves.
        if candidate.policy == "decode_first" and pipeline.max_batch_tokens == "auto" and self._lengths.exact:
            near += [replace(candidate, begins=round(step * candidate.begins)) for step in STEPS]
        # Sequences that began together are young together: more of them fit then, and some are suspended later on.
        if pipeline.micro_batch_size == "auto":
            near.append(replace(candidate, size=round(STEPS[1] * candidate.size)))
        if pipeline.rounds == "auto":
            near.append(replace(candidate, rounds=candidate.rounds + max(1, candidate.rounds // 8)))
        for each in near:
            full = each.size <= min(each.begins, self._share(each.rounds)) and each.begins <= each.tokens
            if full and each.rounds <= min(MOST_ROUNDS, self._most) and self._goes_on:
                with suppress(UserError):
                    yield self._simulate(each, self._layout(each))

    def _predictable(self, found: _Found) -> bool:
        """Whether the job is large enough for a prediction: of a small one, mostly the tail counts."""
        if not self._lengths.sizes:  # requests alike, or more than the sample
            return True
        few = not self._lengths.exact and self._count < FEW_WAVES * found.layout.concurrency
        return not few and found.outcome.tail <= LONG_TAIL

    # -- what is in reach

    def _rounds(self) -> list[int]:
        """Numbers of rounds worth a look: up to those that fill the ring when every visit is as short as can be."""
        if self._config.pipeline.rounds != "auto":
            return [self._config.pipeline.rounds]
        layers, ranks = self._model.num_layers, self._machine.ranks
        even = tuple(round(rank * layers / ranks) for rank in range(ranks))
        cycle = self._stages(even).cycle(VisitLoad(1, self._prompt, sampled=1))
        most = min(MOST_ROUNDS, int(cycle.trip / max(cycle.busiest, 1e-9)) + ranks, self._most)
        steps, step = {1, ranks, ranks + 1, 2 * ranks, most}, 1
        while step < most:
            steps.add(step)
            step = max(step + 1, round(1.25 * step))
        return sorted(rounds for rounds in steps if rounds <= most)

    def _share(self, rounds: int) -> int:
        """Requests in flight of each of `rounds`, were all in flight at once."""
        return -(-self._most // rounds)

    def _sizes(self, rounds: int, tokens: int) -> list[int]:
        """Micro-batch sizes worth a look."""
        pipeline = self._config.pipeline
        if pipeline.micro_batch_size != "auto":
            return [pipeline.micro_batch_size]
        share = self._share(rounds)
        steps = {share // waves for waves in (1, 2, 3, 4)} | {tokens}
        steps |= {size * 2**power for power in range(12) for size in (1, 3)}
        return sorted(size for size in steps if 1 <= size <= min(share, tokens))

    def _most_rows(self, partition: tuple[int, ...], rounds: int, swap: int, tokens: int) -> list[int]:
        """How many sequences a round's pages hold: of all ages, and while they are young.

        With more than the latter some would always be suspended.
        """
        if self._config.pipeline.micro_batch_size != "auto":
            return [self._config.pipeline.micro_batch_size]
        pages = self._main_pages(partition, rounds, swap, tokens) / rounds + swap
        young = 1 + (self._computed + self._output / 8) / self._config.kvcache.page_size
        return [max(1, int(pages / each)) for each in (self._mean_pages, young)]

    def _swaps(self, partition: tuple[int, ...], rounds: int, size: int, tokens: int) -> list[int]:
        """Numbers of swap pages worth a look: none, and parts of what the micro-batch is short of."""
        kv = self._config.kvcache
        if kv.swap_pages != "auto":
            return [kv.swap_pages]
        if rounds == 1 or not any(self._swapped(partition)):
            return [0]
        pages = self._capacity(partition, rounds, 0, tokens)
        # Memory of the slab for each swap page
        slab = max(slab_slots(end - first) / (end - first) for first, end in self._bounds(partition))
        wanted = min(size, -(-self._count // rounds)) * self._mean_pages
        if kv.main_pages == "auto":
            most = min((wanted - pages / rounds) / (1 - slab / rounds), pages / 2 / slab)
        else:
            most = min(wanted - min(pages, kv.main_pages) / rounds, (pages - kv.main_pages) / slab)
        most = max(0, int(min(most, self._host_pages(partition, rounds))))
        return sorted({most * part // SWAP_PARTS for part in range(SWAP_PARTS + 1)})

    def _host_pages(self, partition: tuple[int, ...], rounds: int) -> int:
        """As many swap pages of each of `rounds` does host memory hold."""
        each = [self._machine.page_bytes * layers * rounds for layers in self._swapped(partition)]
        return min(self._machine.host_memory // nbytes if nbytes else ENDLESS for nbytes in each)

    def _partitions(self, policy: str, size: int, tokens: int) -> list[tuple[int, ...]]:
        """Layer splits worth a look: ranks that take equally long, and ranks whose pages last equally long."""
        set_by_hand = self._config.pipeline.partition
        if set_by_hand != "auto":
            return [parse_partition(set_by_hand, self._machine.ranks, self._model.num_layers)]
        return self._splits(policy, float(size), self._count > size, tokens)

    def _best_splits(self, policy: str, rows: float, mixes: bool, tokens: int) -> list[tuple[int, ...]]:
        """The same for micro-batches of `rows` sequences; see `_kinds`."""
        fastest = self._split_of_work(self._kinds(policy, rows, mixes, tokens))
        widest = self._widest(tokens)
        room, most = (self._capacity(split, self._machine.ranks, 0, tokens) for split in (fastest, widest))
        if most <= (1 + EQUAL) * room:  # hardly wider
            return [fastest]
        return [fastest, widest] if room >= self._sequence_pages else [widest]

    def _split_of_work(self, loads: list[tuple[float, VisitLoad]]) -> tuple[int, ...]:
        """The split whose slowest rank has done `loads`, numbers of visits and each one's load, soonest."""
        last = self._machine.ranks - 1
        parts, part_of = self._parts

        @cache
        def seconds(times: StageTimes, *ends: bool) -> FloatArray:
            took = [sum(visits * times.seconds(load, part, *ends) for visits, load in loads) for part in parts]
            return np.array(took)[part_of]

        return best_split([seconds(times, rank == 0, rank == last) for rank, times in enumerate(self._machine.stages)])

    @cached_property
    def _parts(self) -> tuple[list[tuple[int, ...]], IntArray]:
        """All that layers i to j (exclusive) may be, counted by their kinds, and which of it they are: [i, j]."""
        layers, found = range(self._model.num_layers), dict[tuple[int, ...], int]()
        index = [
            [found.setdefault(self._machine.counts(i, max(i, j)), len(found)) for j in (*layers, len(layers))]
            for i in layers
        ]
        return list(found), np.array(index)

    def _split_of_memory(self, tokens: int) -> tuple[int, ...]:
        """The split whose ranks have room for as many pages as can be, of visits of `tokens` tokens."""
        layers, ranks = self._model.num_layers, self._machine.ranks
        first = np.arange(layers)[:, None]
        end = np.maximum(first + 1, np.arange(layers + 1))
        pages = [self._pages_of(rank, ranks, 0, tokens, first, end) for rank in range(ranks)]
        return best_split([np.where(each > 0, 1 / np.maximum(each, 1), end - first) for each in pages])

    # -- memory

    def _bounds(self, partition: tuple[int, ...]) -> list[tuple[int, int]]:
        """The first layer of each rank, and the one behind its last."""
        return [*zip(partition, (*partition[1:], self._model.num_layers), strict=True)]

    def _swapped(self, partition: tuple[int, ...]) -> list[int]:
        """Layers of each rank that have main and swap pages."""
        return [end - first - int(self._sliding_layers(first, end)) for first, end in self._bounds(partition)]

    def _kv_bytes(self, rank: int, rounds: int, tokens: int, first: Any, end: Any) -> Any:
        """What `rank` has left for pages beside the weights of layers `first` to `end` and the frames of all rounds.

        Here and in the next two, either may be an array.
        """
        ends = (rank == 0) + (rank == self._machine.ranks - 1)
        if self._machine.ranks == 1 and self._model.tied_embeddings:
            ends = 1
        left = self._machine.memory[rank] - ends * self._embedding_bytes
        left = left - (self._bytes_before[end] - self._bytes_before[first]) - (end - first) * self._machine.graph_bytes
        if self._machine.receives_on_device and rank:
            left = left - (rounds + 1) * tokens * self._machine.token_bytes(rank - 1)
        cap = self._config.kvcache.gpu_memory_gb
        return left if cap is None else np.minimum(left, cap * GB)

    def _pages_of(self, rank: int, rounds: int, swap: int, tokens: int, first: Any, end: Any) -> Any:
        """Main pages for which `rank` has room beside the slab of `swap` pages."""
        sliding = self._sliding_layers(first, end)
        whole = end - first - sliding
        left = self._kv_bytes(rank, rounds, tokens, first, end) / self._machine.page_bytes
        left = left - sliding * (1 + self._sliding_pages(0, rounds, swap, tokens))
        if swap:
            left -= swap * slab_slots(int(whole), rounds)
        return left // (whole + self._beside * sliding)

    def _sliding_layers(self, first: Any, end: Any) -> Any:
        """How many of the layers `first` to `end` have sliding pages."""
        return self._sliding_before[end] - self._sliding_before[first] if self._beside else 0 * first

    def _sliding_pages(self, main: int, rounds: int, swap: int, tokens: int) -> int:
        """Sliding pages beside `main` main pages and the swap pages of all rounds, of visits of `tokens` tokens."""
        if not self._beside:
            return 0
        beside = self._beside * (main + swap * rounds)
        return int(beside) + self._most_sliding + tokens // self._config.kvcache.page_size

    def _pages_that_fit(self, partition: tuple[int, ...], rounds: int, swap: int, tokens: int) -> int:
        """The same of the rank that can hold the fewest under this split."""
        parts = enumerate(self._bounds(partition))
        return int(min(self._pages_of(rank, rounds, swap, tokens, *part) for rank, part in parts))

    def _main_pages(self, partition: tuple[int, ...], rounds: int, swap: int, tokens: int) -> int:
        """Main pages beside a slab of `swap`: what is left, or what is set by hand."""
        left = max(0, self._capacity(partition, rounds, swap, tokens))
        by_hand = self._config.kvcache.main_pages
        return left if by_hand == "auto" else min(left, by_hand)

    def _layout(self, candidate: _Candidate) -> Layout:
        """`candidate` in full. Raises UserError where its pages do not fit, or not even a sequence fits its pages."""
        kv = self._config.kvcache
        rounds, swap, tokens = candidate.rounds, candidate.swap, candidate.tokens
        parts = self._bounds(candidate.partition)
        shares = [end - first for first, end in parts]
        if rounds > 1 and swap > self._host_pages(candidate.partition, rounds):
            gigabytes = rounds * swap * self._machine.page_bytes * max(shares) / GB
            raise UserError(
                f"kvcache.swap_pages={swap} of {rounds} rounds take {gigabytes:.3f} GB of host memory for "
                f"{max(shares)} layers, but a rank has {self._machine.host_memory / GB:.3f} GB: set fewer"
            )
        pages = [int(self._pages_of(rank, rounds, 0, tokens, *part)) for rank, part in enumerate(parts)]
        rank = pages.index(min(pages))
        free = max(0.0, self._kv_bytes(rank, rounds, tokens, *parts[rank]))
        has = (
            f"rank {rank} has {free / GB:.3f} GB for the KV cache of its {shares[rank]} layers, "
            f"which is {max(0, pages[rank])} pages of {kv.page_size} tokens"
        )
        if kv.gpu_memory_gb is not None:
            has += f" (kvcache.gpu_memory_gb={kv.gpu_memory_gb})"
        asked = 0 if kv.main_pages == "auto" else kv.main_pages
        room = self._capacity(candidate.partition, rounds, swap, tokens)
        if (asked or swap) and asked > room:
            slab = swap * slab_slots(shares[rank], rounds)
            gigabytes = (asked * shares[rank] + slab) * self._machine.page_bytes / GB
            keys = f"kvcache.main_pages={kv.main_pages} and kvcache.swap_pages={kv.swap_pages}"
            raise UserError(f"{keys} take {gigabytes:.3f} GB, but {has}")
        concurrency = min(self._most, rounds * candidate.size)
        # A little more than they hold at their longest: admission keeps that much free. And a request that is longer
        # than all of the sample must not fail for want of memory that is there.
        wanted = concurrency * self._longest + -(-2 * candidate.size // kv.page_size) + 1
        wanted = max(wanted, -(-self._model.max_context // kv.page_size))
        main = asked or min(room, wanted)
        if main + swap < self._sequence_pages:
            what = f"kvcache.main_pages={main}" if asked else f"kvcache.main_pages=auto: {has}"
            raise UserError(
                f"{what}; too few for one request of this workload, which needs {self._sequence_pages} "
                f"({self._prompt:.0f} tokens of prompt and {self._output:.0f} of answer)"
            )
        # A pool for all that the GPU cannot hold, should every sequence grow to its end, and for two more.
        useful = max(0, concurrency * self._longest - main - rounds * swap) + 2 * self._longest
        page_bytes = self._machine.page_bytes * max(self._swapped(candidate.partition))
        left = self._machine.host_memory - rounds * swap * page_bytes
        height = min(kv.buddy_height, useful.bit_length() + 1)
        while height and pool_pages(height) * page_bytes > left:
            height -= 1
        return Layout(
            partition=candidate.partition,
            rounds=rounds,
            micro_batch_size=candidate.size,
            concurrency=concurrency,
            max_batch_tokens=tokens,
            visit_tokens=candidate.begins,
            policy=candidate.policy,
            page_size=kv.page_size,
            main_pages=main,
            swap_pages=swap,
            host_height=height,
            fp8_pages=kv.fp8,
            sliding_pages=self._sliding_pages(main, rounds, swap, tokens),
            window=self._model.window,
        )

    # -- the arithmetic

    def _load(self, rows: float, sampled: float, prefills: float = 0.0, pairs: float = 0.0) -> VisitLoad:
        """A visit in which `rows` sequences, half way through their answers, get a token each, beside prompt tokens."""
        again = read_once(self._machine, self._lengths, self._config.kvcache.page_size, rows)
        context, window = self._prompt + self._output / 2, self._machine.window
        beyond = rows * float(outside(context, window)), prefills * float(outside(self._prompt, window))
        load = VisitLoad(rows, rows * context - again, prefills, pairs + again, sampled)
        return load._replace(outside_kv=beyond[0], outside_pairs=beyond[1])

    def _kinds(self, policy: str, rows: float, mixes: bool, budget: int) -> list[tuple[float, VisitLoad]]:
        """The visits that take a micro-batch of `rows` from prompts to the ends of answers, as numbers of each kind.

        A visit has `budget` tokens. `decode_first` spreads prompts over the answers of others, if it `mixes` the two;
        otherwise one is done, then the other.
        """
        prompts, answers = rows * self._computed, rows * (self._output - 1)
        if policy == "decode_first" and mixes:
            visits = max(self._output, (prompts + answers) / budget)
            n, p = answers / visits, prompts / visits
            return [(visits, self._load(n, rows / visits + n, p, p * self._prompt))]
        fills = max(1.0, prompts / (min(budget, self._computed) if policy == "vanilla" else budget))
        p, n = prompts / fills, min(rows, budget)
        reach = min(self._prompt, self._lengths.shared + budget)
        fill = VisitLoad(0, 0, p, p * reach, rows / fills)
        kinds = [(fills, fill._replace(outside_pairs=p * float(outside(reach, self._machine.window))))]
        return [*kinds, (answers / n, self._load(n, n))] if answers else kinds

    def _decode(self, partition: tuple[int, ...], rows: float) -> list[float]:
        """Seconds of each rank for a visit of `rows` sequences that decode."""
        return self._stages(partition).seconds(self._load(rows, rows))

    def _held(self, candidate: _Candidate) -> float:
        """Sequences of all ages that the pages of a round hold."""
        main = self._main_pages(candidate.partition, candidate.rounds, candidate.swap, candidate.tokens)
        return (main / candidate.rounds + candidate.swap) / self._mean_pages

    def _pace(self, candidate: _Candidate) -> _Pace:
        """The rate at which `candidate` goes through waves of sequences: prompts first, then answers."""
        stages = self._stages(candidate.partition)
        rows = max(1e-9, min(candidate.size, self._held(candidate), self._most / candidate.rounds))
        waves = max(1.0, self._count / (candidate.rounds * rows))
        rounds = candidate.rounds * min(1.0, rows)  # those that have a sequence at all
        rows = max(1.0, rows)
        swapped = min(candidate.swap, rows * self._mean_pages) if candidate.rounds > 1 else 0.0
        total = 0.0
        for visits, load in self._kinds(candidate.policy, rows, waves > 1, candidate.begins):
            cycle = stages.cycle(load._replace(swapped=swapped))
            total += visits * cycle.seconds(rounds)
        # The last wave may be a small one, and takes its time nevertheless.
        rate = rounds * rows * self._output / total * waves / -(-waves // 1)
        return _Pace(rate, rows, cycle)

    def _bound(self, candidate: _Candidate) -> str:
        """The resource that keeps `candidate` from being faster: what takes longest, or what more sequences lack."""
        _, rows, cycle = self._pace(candidate)
        rounds = candidate.rounds
        least = (1 - EQUAL) * cycle.seconds(rounds)
        for resource, seconds in ((BUS, cycle.copies), (BANDWIDTH, cycle.wire)):
            if rounds * seconds >= least:
                return resource
        computes = rounds * cycle.busiest >= least
        if computes and rounds * max(self._decode(candidate.partition, 2 * rows)) >= GAIN * 2 * cycle.seconds(rounds):
            return COMPUTE
        if rounds * rows >= (1 - EQUAL) * self._most:
            return REQUESTS
        if self._held(candidate) <= (1 + EQUAL) * candidate.size:
            return MEMORY
        return COMPUTE if computes else LATENCY

    def _hint(self, bound: str, most: float) -> str:
        """What a setting would bring that halves what binds but changes answers, if it is more than `most` tokens/s."""
        machine = self._machine
        if bound == BANDWIDTH and not machine.coded:
            key, machine = "comm.activations=fp8", replace(machine, coded=True)
        elif bound in (MEMORY, BUS) and not self._config.kvcache.fp8:
            key, share = "kvcache.dtype=fp8", 1 / self._dtype.itemsize
            stages = tuple(replace(times, page_s=times.page_s * share) for times in machine.stages)
            machine = replace(machine, page_bytes=round(machine.page_bytes * share), stages=stages)
        else:
            return ""
        gain = max(_Search(self._config, self._model, self._dtype, self._lengths, machine)._rates().values()) / most
        return f"{key} would bring {gain:.1f} times as much, and change answers a little" if gain > WORTH_IT else ""

    def _why(self, bound: str, candidate: _Candidate, layout: Layout) -> str:
        """One sentence of arithmetic behind `bound`."""
        _, rows, cycle = self._pace(candidate)
        rounds = candidate.rounds
        trip = f"a trip round the ring takes {1e3 * cycle.trip:.1f} ms"
        visits = f"{rounds} visits keep" if rounds > 1 else "its visit keeps"
        work = f"{visits} the slowest rank busy for {1e3 * rounds * cycle.busiest:.1f} ms"
        if bound == COMPUTE:
            return f"{work}, and {trip}"
        if bound == LATENCY:
            return f"{trip}, {1e3 * self._machine.latency_s:.1f} ms of it latency, but {work}"
        if bound == BANDWIDTH:
            return f"a visit keeps the busiest link occupied for {1e3 * cycle.wire:.1f} ms, a rank for less"
        if bound == BUS:
            return (
                f"the swap pages of a visit take {1e3 * cycle.copies:.1f} ms to come in, "
                f"its work {1e3 * cycle.busiest:.1f} ms; {trip}"
            )
        if bound == MEMORY:
            fit = (layout.main_pages + rounds * layout.swap_pages) / self._mean_pages
            return f"the pages hold {fit:.0f} sequences of all ages, {fit / rounds:.1f} a round; {trip}"
        return f"{self._count} in all, {rows:.1f} in a round; {trip}, and {work}"


def table(layout: Layout, layers: int, exact: bool = True) -> str:
    """`layout` for the eye: a line per rank (alike ones together), then what circulates and what to expect.

    Where answers may end before their `max_tokens`, they are not `exact`.
    """
    lines = ["rank      layers  first  stage ms"]
    shares = [layout.shard(rank, layers) for rank in range(len(layout.partition))]
    for rank, share in enumerate(shares):
        seconds = f"{1e3 * layout.stage_s[rank]:8.2f}" if layout.stage_s else " " * 8
        lines.append(f"{rank:<8}  {share.last - share.first:6}  {share.first:5}  {seconds}")
    if len(lines) > 17:
        widths = Counter(share.last - share.first for share in shares)
        spread = ", ".join(f"{number} ranks of {width}" for width, number in sorted(widths.items()))
        lines = [*lines[:4], f"... {len(shares) - 4} more ...", lines[-1], f"layers: {spread}"]
    lines.append(
        f"{layout.rounds} round{'s' * (layout.rounds > 1)} of "
        f"{layout.micro_batch_size} sequence{'s' * (layout.micro_batch_size > 1)}, "
        f"{layout.concurrency} in flight, up to {layout.visit_tokens or layout.max_batch_tokens} tokens a visit, "
        f"policy {layout.policy}"
    )
    swapping = f"{layout.swap_pages} swap pages for each round" if layout.swap_pages else "no swapping"
    pool = f"a host pool of {pool_pages(layout.host_height)}" if layout.host_height else "no host pool"
    sliding = f", {layout.sliding_pages} sliding pages for layers with a window" if layout.sliding_pages else ""
    lines.append(
        f"KV memory of {layout.main_pages} main pages of {layout.page_size} tokens{sliding}, {swapping}, {pool}"
    )
    if layout.predicted is not None:
        condition = "" if exact else " if all answers are as long as max_tokens allows (less if they end earlier)"
        lines.append(
            f"predicted {layout.predicted:,.1f} output tokens/s{condition}, bound by {layout.bound}: {layout.why}"
        )
    elif layout.bound:
        lines.append(f"too small a job for a prediction, bound by {layout.bound}: {layout.why}")
    if layout.hint:
        lines.append(layout.hint)
    return "\n".join(lines)
