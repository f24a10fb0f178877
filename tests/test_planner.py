"""The planner: its model of times, the simulation against closed forms, and the plans that it chooses and refuses."""

import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import deserve.plan
from deserve.batch import VisitPlan
from deserve.comm.world import World
from deserve.config import Config, load_config
from deserve.errors import UserError
from deserve.layout import Layout, Shard, slab_slots
from deserve.memory import available_memory, left_by_control_groups
from deserve.model.checkpoint import resolve
from deserve.model.config import parse_config
from deserve.model.graphs import MOST_ROWS, graph_tokens
from deserve.model.weights import layer_kinds, parameter_bytes
from deserve.planner import survey as surveying
from deserve.planner.planner import EFFORT, _Search, choose_plan, table
from deserve.planner.simulator import Outcome, Simulation, simulate
from deserve.planner.survey import Shape, Visited, stepped, survey
from deserve.planner.times import Cost, Curve, LinkTimes, Machine, StageTimes, VisitLoad, stated_times
from deserve.workload import Lengths

LAYERS = 8
MS = 1e-3


@pytest.fixture(autouse=True)
def any_good_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate fewer visits: most tests need no more than a good plan."""
    monkeypatch.setattr("deserve.planner.planner.EFFORT", (1_000, 100, 5_000))


@pytest.fixture
def best_plan(any_good_plan: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate as many visits as for a user."""
    monkeypatch.setattr("deserve.planner.planner.EFFORT", EFFORT)


def machine(
    ranks: int,
    latency_ms: float = 0,
    layer_ms: float = 1.0,
    per_token_ms: float = 0,
    byte_s: float = 0,
    memory: int = 10**9,
) -> Machine:
    """Ranks on which a layer takes `layer_ms` and `per_token_ms` for each token of a visit."""
    tokens = Curve((0.0, 1.0), (layer_ms * MS, (layer_ms + per_token_ms) * MS))
    times = StageTimes((Cost(tokens),))
    return Machine((times,) * ranks, (LinkTimes(latency_ms * MS, byte_s),) * ranks, (memory,) * ranks, 10**8, 64, 1024)


def plan(ranks: int, rounds: int, size: int, policy: str = "prefill_first", **changes: Any) -> Layout:
    """A plan with an even layer split and plenty of pages."""
    partition = tuple(round(rank * LAYERS / ranks) for rank in range(ranks))
    made = Layout(partition, rounds, size, rounds * size, 512, policy, 16, 100_000, 0, 0)
    return replace(made, **changes)


def lengths(count: int | None, prompt: int = 16, output: int = 32) -> Lengths:
    return Lengths(count, float(prompt), float(output), prompt + output)


def simulated(made: Layout, requests: Lengths, on: Machine) -> Outcome:
    return simulate(made, requests, on, LAYERS)


# -- times


def test_curve_goes_through_its_points_and_on() -> None:
    curve = Curve((1.0, 4.0, 8.0), (1.0, 2.0, 6.0))
    assert [curve(x) for x in (0, 1, 2.5, 4, 6, 10)] == pytest.approx([1, 1, 1.5, 2, 4, 8])
    assert Curve()(17) == 0


def test_times_survive_json() -> None:
    times = StageTimes(
        (Cost(Curve((1.0, 2.0), (3.0, 4.0)), kv_s=5.0, mixed_s=6.0), Cost(windowed=True)),
        request_s=7.0,
        head=Curve((0.0, 1.0), (0.0, 2.0)),
    )
    assert TypeAdapter(StageTimes).validate_python(json.loads(json.dumps(asdict(times)))) == times


def test_a_visit_of_both_kinds_pays_for_mixing_them() -> None:
    cost = Cost(Curve((0.0, 1.0), (0.0, MS)), mixed_s=5 * MS)
    assert cost(VisitLoad(decodes=2)) == pytest.approx(2 * MS)
    assert cost(VisitLoad(prefills=3)) == pytest.approx(3 * MS)
    assert cost(VisitLoad(decodes=2, prefills=3)) == pytest.approx(10 * MS)


def test_requests_cost_the_first_rank_when_they_begin() -> None:
    times = StageTimes((Cost(),), request_s=MS)
    load = VisitLoad(decodes=5, prefills=64, sampled=7)  # two prompts are followed by their first tokens
    assert times.seconds(load, (1,), True, False) == pytest.approx(2 * MS)
    assert times.seconds(load, (1,), False, True) == 0


def test_roofline_of_a_llama_70b_layer() -> None:
    model = resolve(load_config(["model=llama-3-70b", "model.weights=dummy"]).model).config
    (layer,) = stated_times(model, torch.bfloat16, 4e12, 700e12, None, 512).layers
    assert layer(VisitLoad(decodes=32)) == pytest.approx(0.43 * MS, rel=0.02)  # 1.71 GB at 4 TB/s
    assert layer(VisitLoad(decodes=512)) == pytest.approx(1.25 * MS, rel=0.02)  # 876 GFLOP at 700 TFLOP/s


def test_roofline_of_a_layer_of_experts() -> None:
    """Qwen3-30B-A3B: 9.4 MB an expert, 128 of them, 8 for each token, and 38.3 MB beside them; at 4 TB/s."""
    model = resolve(load_config(["model=qwen3-30b-a3b", "model.weights=dummy"]).model).config
    (layer,) = stated_times(model, torch.bfloat16, 4e12, 700e12, None, 512).layers
    for tokens, touched in ((1, 8), (2, 15.5), (16, 82.4), (64, 125.9), (128, 128)):
        assert layer(VisitLoad(decodes=tokens)) == pytest.approx((38.3e6 + touched * 9.44e6) / 4e12, rel=0.01)
    # 65,536 tokens: arithmetic binds; 19.1 million parameters beside experts, and 8 experts of 4.7
    assert layer(VisitLoad(prefills=65536)) == pytest.approx(2 * 65536 * (19.1e6 + 8 * 4.72e6) / 700e12, rel=0.01)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.integers(0, 2), min_size=4, max_size=9),
    layer_ms=st.tuples(*[st.floats(0.01, 5)] * 3),
    speeds=st.lists(st.floats(0.2, 5), min_size=2, max_size=4),
    head_ms=st.floats(0, 5),
    ahead=st.booleans(),
)
def test_no_split_has_a_faster_slowest_rank(
    kinds: list[int], layer_ms: tuple[float, ...], speeds: list[float], head_ms: float, ahead: bool
) -> None:
    """Of all contiguous ones. A visit of both decodes and prompts, and one of decodes alone."""
    kinds, ranks = [kind % len(set(kinds)) for kind in kinds], len(speeds)
    stages = tuple(
        StageTimes(
            tuple(Cost(Curve((0.0, 1.0), (speed * ms * MS, 1.01 * speed * ms * MS))) for ms in layer_ms),
            head=Curve((0.0,), (head_ms * MS,)),
            host=Curve((0.0,), (2 * MS,)),
            ahead=ahead,
        )
        for speed in speeds
    )
    on = replace(machine(ranks), stages=stages, kinds=tuple(kinds))
    loads = [(3.0, VisitLoad(8, 100, 50, 500, 9)), (20.0, VisitLoad(8, 100, sampled=8))]
    search = searching(on, len(kinds))

    def slowest(split: tuple[int, ...]) -> float:
        ends = zip(split, (*split[1:], len(kinds)), strict=True)
        return max(
            sum(n * times.seconds(load, on.counts(*part), rank == 0, rank == ranks - 1) for n, load in loads)
            for rank, (times, part) in enumerate(zip(stages, ends, strict=True))
        )

    every = itertools.combinations(range(1, len(kinds)), ranks - 1)
    assert slowest(search._split_of_work(loads)) <= min(slowest((0, *firsts)) for firsts in every) * (1 + 1e-6)


def test_ranks_that_do_not_decide_are_alike_too() -> None:
    """The last rank's head takes as long as ten layers: the others still share theirs."""
    on = machine(4)
    on = replace(on, stages=tuple(replace(times, head=Curve((0.0,), (10 * MS,))) for times in on.stages))
    assert searching(on, 10)._split_of_work([(1.0, VisitLoad(1, 1, sampled=1))]) == (0, 3, 6, 9)


def searching(on: Machine, layers: int) -> _Search:
    raw = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "vocab_size": 320, "hidden_size": 64}
    raw |= {"intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
    return _Search(load_config([]), parse_config(raw, "test"), torch.float32, lengths(4000), on)


def test_layers_that_differ_are_split_by_their_times() -> None:
    """Layers of 1 and 3 ms by turns, then six of 1 ms: 9 ms for each of two ranks."""
    raw: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 12, "vocab_size": 320}
    raw |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw |= {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    raw |= {"mlp_only_layers": [0, 2, 4, *range(6, 12)], "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
    model = parse_config(raw, "test")
    kinds = layer_kinds(model, torch.float32)
    assert kinds == (0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0)
    costs = tuple(Cost(Curve((0.0,), (ms * MS,))) for ms in (1, 3))
    on = replace(machine(2), stages=(StageTimes(costs),) * 2, kinds=kinds)
    found, _ = choose_plan(load_config([]), model, torch.float32, lengths(4000), on)
    assert found.partition == (0, 5) and found.stage_s == pytest.approx((9 * MS, 9 * MS))


def test_layers_that_differ_are_split_by_their_bytes() -> None:
    """The first six of twelve layers have one MLP, the others 16 experts of half its size: 8 MLPs in parameters."""
    raw: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 12, "vocab_size": 320}
    raw |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw |= {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [*range(6)]}
    model = parse_config(raw | {"max_position_embeddings": 512, "rms_norm_eps": 1e-6}, "test")
    on = machine(2, memory=5_000_000)
    found, _ = choose_plan(load_config([]), model, torch.float32, lengths(4000), on)
    assert found.partition == (0, 8)
    for rank, layers in enumerate((8, 4)):
        held = parameter_bytes(model, found.shard(rank, 12), torch.float32)
        held += (found.main_pages * layers + found.swap_pages * slab_slots(layers, found.rounds)) * on.page_bytes
        assert held <= 5_000_000


@pytest.mark.parametrize("swap", [0, 20])
def test_layers_with_a_window_hold_little_more_than_that(swap: int) -> None:
    """Eight of twelve layers have a window of 64 tokens: 4 + 2 pages of a sequence of 32 at its end, 31 on average."""
    raw: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 12, "vocab_size": 320}
    raw |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw |= {"max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "use_sliding_window": True, "sliding_window": 64}
    raw |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4}
    on, config = machine(2, memory=5_000_000), load_config([f"kvcache.swap_pages={swap}", "pipeline.rounds=2"])
    found, without = (
        choose_plan(config, parse_config(raw | more, "test"), torch.float32, lengths(400, 481, 32), on)[0]
        for more in ({}, {"use_sliding_window": False, "layer_types": None})
    )
    assert found.window == 64 and not without.sliding_pages
    for rank in range(2):
        shard, model = found.shard(rank, 12), parse_config(raw, "test")
        layers, sliding = shard.last - shard.first, len(model.sliding(shard.first, shard.last))
        pages = found.layer_pages(layers, sliding)
        held = parameter_bytes(model, shard, torch.float32) + pages * on.page_bytes
        assert held <= 5_000_000 < held * 1.05
    fitting = (found.main_pages + 2 * swap) / (without.main_pages + 2 * swap)
    assert 12 / (4 + 8 * 6 / 32) * 0.8 < fitting < 12 / (4 + 8 * 6 / 32) * 1.2
    short, _ = choose_plan(config, parse_config(raw, "test"), torch.float32, lengths(400, 48, 16), on)
    assert not short.sliding_pages  # no sequence is longer than its window by much


def test_layers_with_a_window_attend_to_no_more() -> None:
    """64 sequences of 500 tokens, 400 of which lie outside the window of one of two layers."""
    costs = Cost(kv_s=1e-6, pair_s=1e-8), Cost(kv_s=1e-6, pair_s=1e-8, windowed=True)
    on = replace(machine(1), stages=(StageTimes(costs),), window=100, kinds=(0, 1))
    arange, answers = np.arange(64, dtype=np.int32), VisitPlan(0)
    for new, whole, near in ((1, 501e-6, 101e-6), (100, 60_000e-8, 10_000e-8)):
        rows = np.full(64, new, np.int32)
        made = replace(answers, slots=arange, new_tokens=rows, context=np.full(64, 500, np.int32))
        load = VisitLoad.of(made, on.window)
        assert costs[0](load) == pytest.approx(64 * whole) and costs[1](load) == pytest.approx(64 * near)
        assert on.stages[0].layers_s(load, on.counts(0, 2)) == pytest.approx(64 * (whole + near))


def test_what_a_sequence_holds_with_windows_and_without() -> None:
    """Gemma-3-27B: 52 of 62 layers reach 1,024 tokens back, 66 pages; a page of a layer takes 128 KiB."""
    config = deserve.plan.load_plan_config(["model=gemma-3-27b", "model.weights=dummy", "kv_memory_gb=8.4"])
    model = resolve(config.model).config
    said = deserve.plan.sequence_pages(config, model, torch.bfloat16, 8192)
    held, without = (10 * 512 + 52 * 66) * 2**17 / 1e9, 62 * 512 * 2**17 / 1e9
    assert f" {held:.2f} GB" in said and f" {without:.2f} GB" in said and ": 14 and 4 of them" in said
    assert not deserve.plan.sequence_pages(config, model, torch.bfloat16, 1024)


def test_sliding_pages_of_layers_with_a_window_stay() -> None:
    times = StageTimes((Cost(), Cost(windowed=True)), page_s=MS)
    load = VisitLoad(swapped=3)
    assert times.copies(load, (2, 5)) == pytest.approx(21 * MS)
    assert replace(times, sliding=True).copies(load, (2, 5)) == pytest.approx(6 * MS)


# -- the simulation against arithmetic


def test_one_round_without_latency_pays_every_stage_for_every_token() -> None:
    outcome = simulated(plan(2, 1, 8), lengths(8), machine(2))
    assert outcome.seconds == pytest.approx(32 * LAYERS * MS)  # the first token comes with the prompt
    assert outcome.output_tokens == 8 * 32


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 4), rounds=st.integers(1, 12), latency=st.sampled_from([0.0, 3.0, 20.0]))
def test_a_cycle_takes_the_trip_or_the_work_of_all_rounds(ranks: int, rounds: int, latency: float) -> None:
    """Of 8 layers on 3 ranks, one has 3, another 2: the slowest and the sum count."""
    made, on = plan(ranks, rounds, 4), machine(ranks, latency if ranks > 1 else 0)
    shares = [made.shard(rank, LAYERS) for rank in range(ranks)]
    slowest = max(share.last - share.first for share in shares)
    cycle = max(rounds * slowest, LAYERS + (ranks * latency if ranks > 1 else 0))
    outcome = simulated(made, lengths(4 * rounds, output=200), on)
    assert outcome.seconds == pytest.approx(200 * cycle * MS, rel=0.02)


def test_enough_rounds_hide_the_latency() -> None:
    ranks, latency, stage = 2, 20.0, 4.0
    enough = round(ranks * (1 + latency / stage))
    here = simulated(plan(ranks, ranks, 4), lengths(4 * ranks, output=200), machine(ranks))
    far = simulated(plan(ranks, enough, 4), lengths(4 * enough, output=200), machine(ranks, latency))
    assert far.tokens_per_s == pytest.approx(here.tokens_per_s, rel=0.03)


@pytest.mark.parametrize("policy", ["prefill_first", "decode_first", "vanilla"])
def test_latency_never_helps(policy: str) -> None:
    rates = [
        simulated(plan(2, 3, 8, policy), lengths(60), machine(2, ms, per_token_ms=0.1)).tokens_per_s
        for ms in (0, 1, 2, 5, 10, 50)
    ]
    assert rates == sorted(rates, reverse=True)


def test_a_thin_link_sets_the_pace() -> None:
    on = machine(2, byte_s=1e-4)
    made = plan(2, 4, 8)
    outcome = simulated(made, lengths(32, output=100), on)
    frame = on.frame_bytes(VisitLoad(8, 0, 0, 0, 8), 0) * 1e-4
    assert outcome.seconds == pytest.approx(4 * 100 * frame, rel=0.1)


@pytest.mark.parametrize("policy", ["prefill_first", "decode_first", "vanilla"])
def test_a_long_job_is_told_from_its_beginning(policy: str) -> None:
    made, on = plan(2, 3, 8, policy, max_batch_tokens=64), machine(2, 2, per_token_ms=0.05)
    requests = lengths(24 * 12 + 7)
    cut = simulated(made, requests, on)
    wider = simulated(replace(made, concurrency=24 * 12), requests, on)  # no wave to cut it into
    assert cut.visits < wider.visits
    assert cut.seconds == pytest.approx(wider.seconds, rel=0.05)


def test_short_memory_costs_time() -> None:
    on = machine(2, 5)
    rates = [simulated(plan(2, 4, 8, main_pages=pages), lengths(64), on).tokens_per_s for pages in (3, 12, 48, 200)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] / 4


def test_sequences_are_suspended_and_come_back() -> None:
    made = plan(1, 1, 8, main_pages=16, host_height=8)
    run = Simulation(made, [(16, 48)] * 16, machine(1), LAYERS)
    run.run(10**9)
    assert run.scheduler.counters.suspensions
    assert run.now < 16 * 48 * LAYERS * MS


@pytest.mark.parametrize("policy", ["prefill_first", "decode_first"])
@pytest.mark.parametrize("pages", [10_000, 60])
def test_a_coarse_simulation_takes_as_long_as_a_fine_one(policy: str, pages: int) -> None:
    made = plan(2, 4, 8, policy, main_pages=pages, host_height=10, max_batch_tokens=64)
    on = machine(2, 10, per_token_ms=0.1, byte_s=1e-6)
    runs = [Simulation(made, [(64, 97)] * 160, on, LAYERS, grain) for grain in (1, 4)]
    for run in runs:
        run.run(10**9)
    fine, coarse = runs
    assert coarse.visits < fine.visits / 3
    assert 4 * coarse.now == pytest.approx(fine.now, rel=0.06)


@pytest.mark.parametrize("policy", ["prefill_first", "decode_first"])
@pytest.mark.parametrize("pages", [10_000, 2_400])
def test_a_sequence_that_stands_for_four_takes_as_long(policy: str, pages: int) -> None:
    made = plan(2, 2, 256, policy, main_pages=pages, swap_pages=80, host_height=12, max_batch_tokens=512)
    on = machine(2, 10, per_token_ms=0.1, byte_s=1e-6)
    runs = [Simulation(made, [(64, 33)] * (1280 // bundle), on, LAYERS, bundle=bundle) for bundle in (1, 4)]
    for run in runs:
        run.run(10**9)
    each, bundled = runs
    assert bundled.done[-1][0] == each.done[-1][0] == 1280 and bundled.sampled == each.sampled
    assert bundled.now == pytest.approx(each.now, rel=0.05)


def test_the_load_of_a_visit_is_what_the_scheduler_put_into_it() -> None:
    loads: list[VisitLoad] = []

    class Observed(Simulation):
        def travel(self, m: int, load: VisitLoad) -> None:
            loads.append(load)
            super().travel(m, load)

    run = Observed(plan(1, 1, 4, max_batch_tokens=24), [(20, 3), (8, 3), (500_000_000, 3)], machine(1), LAYERS)
    run.run(100)
    assert loads == [
        VisitLoad(prefills=24, pairs=20 * 20 + 4 * 4, sampled=1),
        VisitLoad(decodes=1, decode_kv=21, prefills=4, pairs=4 * 8, sampled=2),
        VisitLoad(decodes=2, decode_kv=22 + 9, sampled=2),
        VisitLoad(decodes=1, decode_kv=10, sampled=1),
    ]
    assert run.done[-1][0] == 2  # what no pages can hold is refused


@pytest.mark.parametrize("grain", [1, 4])
def test_shared_tokens_cost_neither_work_nor_pages(grain: int) -> None:
    """Ten groups of 16 prompts of 72 tokens, of which 64 are the group's: 64 + 16 * 8 tokens for each are computed."""
    prefills = 0.0

    class Observed(Simulation):
        def travel(self, m: int, load: VisitLoad) -> None:
            nonlocal prefills
            prefills += grain * load.prefills
            super().travel(m, load)

    grouped = replace(lengths(160, prompt=72), shared=64.0, readers=16.0)
    # Pages for 16 sequences and two stems; nine would fit without sharing.
    made = plan(2, 2, 8, main_pages=64, max_batch_tokens=128)
    run = Observed(made, [(72, 33)] * 160, machine(2), LAYERS, grain, grouped)
    run.run(10**9)
    assert prefills == 10 * (64 + 16 * 8) and run.most_in_flight == 16
    assert grouped.mean_computed == 8 + 64 / 16
    apart = Simulation(made, [(72, 33)] * 160, machine(2), LAYERS, grain)
    apart.run(10**9)
    assert apart.most_in_flight < 10


def test_shared_pages_are_read_once_on_a_cpu() -> None:
    """Of 64 rows with 64 shared tokens: as a matrix product, by what a pair of tokens takes."""
    times = StageTimes((Cost(kv_s=1e-6, pair_s=1e-9),))
    shared = replace(lengths(64, prompt=72, output=2), shared=64.0)
    seconds = []
    for requests, ahead in ((shared, False), (shared, True)):
        on = replace(machine(1), stages=(replace(times, ahead=ahead),))
        seconds.append(simulated(plan(1, 1, 64, max_batch_tokens=10_000), requests, on).seconds)
    assert seconds[1] - seconds[0] == pytest.approx(LAYERS * 63 * 64 * (1e-6 - 1e-9), rel=0.01)


def test_a_plan_holds_as_many_sequences_as_share_its_pages() -> None:
    requests = lengths(4096, prompt=256)
    made, shared = (
        chosen(each, machine(2, 20), "kvcache.gpu_memory_gb=0.002", "kvcache.swap_pages=0")
        for each in (requests, replace(requests, shared=240.0))
    )
    assert shared.concurrency > 3 * made.concurrency
    assert shared.predicted is not None and made.predicted is not None and shared.predicted > 3 * made.predicted


@pytest.mark.parametrize("answers_first", [False, True])
def test_mixing_prompts_with_answers_fills_visits_while_reading_weights_binds(answers_first: bool) -> None:
    """Prompts of 200 tokens stand apart from answers of 48. A visit takes 1 ms up to 128 tokens."""
    sizes = [(200, 4)] * 150 + [(8, 48)] * 150
    made = plan(2, 3, 16, "decode_first", main_pages=200, host_height=8, max_batch_tokens=128)
    on = machine(2, 5)
    seconds = []
    for mixes in (False, True):
        run = Simulation(made, sizes[::-1] if answers_first else sizes, on, LAYERS, mixed=mixes)
        run.run(10**9)
        assert run.done[-1][0] == 300
        seconds.append(run.now)
    assert seconds[1] < 0.92 * seconds[0]
    assert on.reading_binds(128) and not machine(2, layer_ms=0.01, per_token_ms=1).reading_binds(16)


def test_the_tail_begins_when_most_sequences_have_ended() -> None:
    uneven = simulated(plan(1, 1, 4), mixed([(16, 10)] * 3 + [(16, 40)]), machine(1))
    assert uneven.tail == pytest.approx(0.75, abs=0.05)
    assert simulated(plan(1, 1, 4), lengths(4), machine(1)).tail < 0.05


def mixed(sizes: list[tuple[int, int]]) -> Lengths:
    prompts, outputs = zip(*sizes, strict=True)
    count = len(sizes)
    longest = max(map(sum, sizes))
    return Lengths(count, sum(prompts) / count, sum(outputs) / count, longest, tuple(sizes))


def test_one_long_answer_outlasts_the_others() -> None:
    sizes = [(16, 400)] + [(16, 10)] * 15
    outcome = simulated(plan(1, 1, 16), mixed(sizes), machine(1))
    assert outcome.output_tokens == 400 + 15 * 10
    assert outcome.seconds == pytest.approx(400 * LAYERS * MS, rel=0.02)


# -- plans


def chosen(requests: Lengths, on: Machine, *overrides: str) -> Layout:
    config: Config = load_config(["model=tiny", f"model.architecture.num_hidden_layers={LAYERS}", *overrides])
    return choose_plan(config, resolve(config.model).config, torch.float32, requests, on)[0]


def test_far_ranks_get_enough_rounds() -> None:
    made = chosen(lengths(4096), machine(2, latency_ms=20, per_token_ms=0.1))
    assert made.bound == "compute"
    stage = made.stage_s[0]
    assert made.rounds * stage >= 0.9 * 2 * (stage + 0.02)


def test_layers_follow_speed_and_cover_the_model() -> None:
    on = machine(3)
    slow = StageTimes((Cost(Curve((0.0,), (3 * MS,))),))
    made = chosen(lengths(256), replace(on, stages=(slow, on.stages[1], on.stages[2])))
    shares = [made.shard(rank, LAYERS) for rank in range(3)]
    assert [share.last - share.first for share in shares] == [1, 4, 3]
    assert shares[0].first == 0 and shares[-1].last == LAYERS
    assert all(a.last == b.first for a, b in itertools.pairwise(shares))


def test_the_output_layer_counts_as_layers() -> None:
    on = machine(2)
    heavy = replace(on.stages[0], head=Curve((0.0,), (4 * MS,)))
    assert chosen(lengths(256), replace(on, stages=(heavy, heavy))).partition == (0, 6)
    assert chosen(lengths(256), on).partition == (0, 4)


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.integers(1, LAYERS),
    speeds=st.lists(st.floats(0.1, 5), min_size=LAYERS, max_size=LAYERS),
    memory_mb=st.lists(st.integers(2, 100), min_size=LAYERS, max_size=LAYERS),
    latency=st.sampled_from([0.0, 10.0]),
)
def test_any_plan_is_whole(ranks: int, speeds: list[float], memory_mb: list[int], latency: float) -> None:
    on = machine(ranks, latency)
    on = replace(
        on,
        stages=tuple(StageTimes((Cost(Curve((0.0,), (speed * MS,))),)) for speed in speeds[:ranks]),
        memory=tuple(megabytes * 10**6 for megabytes in memory_mb[:ranks]),
    )
    made = chosen(lengths(64), on)
    ends = (*made.partition[1:], LAYERS)
    assert made.partition[0] == 0 and all(a < b for a, b in zip(made.partition, ends, strict=True))
    assert made.concurrency <= made.rounds * made.micro_batch_size
    assert made.micro_batch_size <= 512 and made.main_pages >= 3
    for rank, (first, end) in enumerate(zip(made.partition, ends, strict=True)):
        assert made.main_pages * on.page_bytes * (end - first) <= on.memory[rank]
    assert made.predicted is not None and made.predicted > 0
    assert made.bound and made.why


def test_what_is_set_by_hand_stays() -> None:
    by_hand = ["pipeline.rounds=5", "pipeline.micro_batch_size=7", "workload.concurrency=30", "kvcache.main_pages=99"]
    made = chosen(lengths(100), machine(2), *by_hand, "pipeline.partition=[emb,1]")
    assert (made.rounds, made.micro_batch_size, made.concurrency, made.main_pages) == (5, 7, 30, 99)
    assert made.partition == (0, 1)


@cache
def on_two_gpus(
    latency_ms: float,
    *overrides: str,
    exact: bool = True,
    visits: int = 8_000,
    visit_ms: float = 0.0,
    frames_on_device: bool = False,
) -> Layout:
    """The plan for Llama-3-70B on two GPUs of 138 GB, a visit of which takes `visit_ms` more than its work.

    Found by simulating `visits`.
    """
    words = ["model=llama-3-70b", "model.weights=dummy", *overrides]
    config = load_config(words)
    model = resolve(config.model).config
    page_bytes = 16 * model.kv_spec(torch.bfloat16).token_bytes
    times = stated_times(model, torch.bfloat16, 4e12, 700e12, None, 1024, page_s=page_bytes / 50e9)
    times = replace(times, visit=Cost(Curve((0.0,), (visit_ms * MS,))))
    link = LinkTimes(latency_ms * MS, 0.0)
    gpus = Machine(
        (times,) * 2,
        (link,) * 2,
        (138 * 10**9,) * 2,
        64 * 10**9,
        2 * model.hidden_size,
        page_bytes,
        receives_on_device=frames_on_device,
        budgets=(512, 1024),
    )
    requests = replace(lengths(20000, 512, 256), exact=exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deserve.planner.planner.EFFORT", (visits, 0, visits))  # less than for so long a job
        return choose_plan(config, model, torch.bfloat16, requests, gpus)[0]


def test_the_host_of_a_device_plans_ahead_of_it() -> None:
    """With more rounds than ranks, what a visit takes before its device begins hides behind another's. A single GPU
    needs no second round for that."""

    def seconds(ranks: int, rounds: int) -> float:
        on = machine(ranks)
        delayed = replace(on, stages=(replace(on.stages[0], ahead=True, start_s=0.003),) * ranks)
        return simulated(plan(ranks, rounds, 8), lengths(8 * rounds), delayed).seconds

    assert seconds(2, 2) == pytest.approx(32 * (0.008 + 2 * 0.003), rel=0.05)
    assert seconds(2, 4) == pytest.approx(4 * 32 * 0.004, rel=0.05)
    assert seconds(1, 1) == pytest.approx(32 * 0.008, rel=0.05)


@pytest.mark.usefixtures("best_plan")
def test_prompts_come_no_faster_than_answers_end_where_that_helps() -> None:
    near, far = on_two_gpus(0), on_two_gpus(64, visits=16_000)
    assert far.policy == "decode_first" and far.visit_tokens < far.max_batch_tokens
    assert far.predicted is not None and near.predicted is not None and far.predicted > 0.9 * near.predicted
    assert far.predicted > 1.05 * (on_two_gpus(64, "pipeline.policy=prefill_first").predicted or 0)
    early = on_two_gpus(64, "pipeline.policy=decode_first", exact=False)
    assert early.visit_tokens == early.max_batch_tokens  # answers that end early mix by themselves


def test_rounds_whose_frames_leave_too_little_for_pages_set_by_hand_are_not_taken() -> None:
    usual = on_two_gpus(64, "kvcache.swap_pages=0", frames_on_device=True)
    narrow = on_two_gpus(64, "kvcache.main_pages=25715", "kvcache.swap_pages=0", frames_on_device=True)
    assert narrow.main_pages == 25715 and narrow.rounds < usual.rounds
    with pytest.raises(UserError, match=r"kvcache\.main_pages=26000"):
        on_two_gpus(64, "kvcache.main_pages=26000", "kvcache.swap_pages=0", frames_on_device=True)


@pytest.mark.usefixtures("best_plan")
def test_visits_get_more_tokens_where_each_costs_more_than_its_work() -> None:
    costly = on_two_gpus(0, "pipeline.policy=prefill_first", visit_ms=15)
    by_hand = on_two_gpus(0, "pipeline.policy=prefill_first", "pipeline.max_batch_tokens=512", visit_ms=15)
    assert costly.max_batch_tokens > by_hand.max_batch_tokens == 512
    assert costly.predicted is not None and costly.predicted > 1.02 * (by_hand.predicted or 0)


def test_policy_and_token_budget_by_hand_stay() -> None:
    made = on_two_gpus(64, "pipeline.policy=vanilla", "pipeline.max_batch_tokens=300")
    assert (made.policy, made.max_batch_tokens, made.visit_tokens) == ("vanilla", 300, 300)
    assert on_two_gpus(64, "pipeline.policy=prefill_first").policy == "prefill_first"


@pytest.mark.parametrize(
    ("requests", "on", "overrides", "bound"),
    [
        (lengths(8), machine(2, 50), [], "too few requests"),
        (lengths(4096), machine(2, 50), ["pipeline.rounds=2"], "link latency"),
        (lengths(4096), machine(2, byte_s=1e-3), [], "link bandwidth"),
        (lengths(4096), machine(2, 500), ["kvcache.gpu_memory_gb=0.0004", "kvcache.swap_pages=0"], "KV memory"),
        (lengths(4096), machine(2, per_token_ms=0.1), [], "compute"),
    ],
)
def test_what_binds(requests: Lengths, on: Machine, overrides: list[str], bound: str) -> None:
    assert chosen(requests, on, *overrides).bound == bound


@pytest.mark.usefixtures("best_plan")
def test_fp8_pages_help_where_memory_binds() -> None:
    on, short = machine(2, 500), ["kvcache.gpu_memory_gb=0.0004", "kvcache.swap_pages=0"]
    plain = chosen(lengths(4096), on, *short)
    assert plain.bound == "KV memory" and not plain.fp8_pages
    assert plain.hint.startswith(
        "kvcache.dtype=fp8 would bring 3.9 times as much"
    )  # float32 takes four times the bytes
    small = chosen(lengths(4096), replace(on, page_bytes=256), *short, "kvcache.dtype=fp8")
    assert small.fp8_pages and not small.hint and small.predicted == pytest.approx(4 * plain.predicted, rel=0.15)


def test_coding_helps_where_far_links_bind() -> None:
    near = replace(machine(3, byte_s=1e-4, per_token_ms=0.01), coded_bytes=20)
    far = replace(near, links=tuple(replace(link, far=True) for link in near.links))
    half = replace(near, links=tuple(replace(link, far=rank == 0) for rank, link in enumerate(near.links)))
    rates = {}
    for name, on in (("near", near), ("half", half), ("far", far)):
        plain, coded = chosen(lengths(4096), on), chosen(lengths(4096), replace(on, coded=True))
        assert plain.bound == "link bandwidth" and not coded.hint
        assert ("comm.activations=fp8 would bring" in plain.hint) == (name == "far"), name
        rates[name] = coded.predicted / plain.predicted
    # Of 16 + 32 tokens, 64 bytes each become 20, and 32 for each token of the answer stay.
    assert rates["near"] == 1 and 0.99 < rates["half"] < 1.05 and rates["far"] == pytest.approx(4096 / 1984, rel=0.05)
    assert not chosen(lengths(4096), replace(far, links=(LinkTimes(far=True),) * 3)).hint


@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (9, [], "9 ranks, but the model has only 8 layers"),
        (2, ["kvcache.main_pages=2", "kvcache.swap_pages=0"], "kvcache.main_pages=2; too few for one request"),
        (2, ["kvcache.gpu_memory_gb=0.000005"], "kvcache.gpu_memory_gb=5e-06"),
        (2, ["kvcache.main_pages=10000000"], "kvcache.main_pages=10000000"),
        (2, ["pipeline.partition=[emb,8]"], "pipeline.partition"),
        (2, ["pipeline.partition=[emb]"], "pipeline.partition"),
    ],
)
def test_plans_that_cannot_work_are_refused(ranks: int, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[").replace(".", r"\.")):
        chosen(lengths(64), machine(ranks), *overrides)


def test_the_host_pool_fits_its_memory() -> None:
    on = replace(machine(2), host_memory=10**6)
    tight = ["kvcache.main_pages=4", "kvcache.swap_pages=0", "pipeline.rounds=2", "pipeline.micro_batch_size=32"]
    made = chosen(lengths(64), on, *tight)
    assert 2 ** (made.host_height - 1) * on.page_bytes * 4 <= 10**6 < 2**made.host_height * on.page_bytes * 4


def test_plan_survives_json() -> None:
    made = chosen(lengths(64), machine(2))
    assert TypeAdapter(Layout).validate_python(json.loads(json.dumps(asdict(made)))) == made
    assert f"{made.rounds} rounds" in table(made, LAYERS)
    assert "max_tokens" not in table(made, LAYERS)
    assert "as long as max_tokens allows" in table(made, LAYERS, exact=False)


def test_a_job_too_small_to_tell_gets_no_prediction() -> None:
    uneven = mixed([(30, 8 * answer) for answer in range(1, 18)])
    made = chosen(replace(uneven, exact=False), machine(2))
    assert made.predicted is None and made.bound
    assert "too small a job for a prediction" in table(made, LAYERS)
    assert chosen(uneven, machine(2)).predicted is None  # its tail is most of it
    assert chosen(lengths(17), machine(2)).predicted is not None


# -- measuring, and the program


def test_what_a_stage_takes_is_told_from_visits_that_differ_in_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of which a layer takes 1 ms and 10 us a token, and so on: found again from the visits of the survey."""
    layer = Cost(Curve((0.0, 1.0), (MS, 1.01 * MS)), Curve((0.0, 1.0), (0.0, 0.001 * MS)), 1e-8, 1e-9, 0.5 * MS)
    truth = StageTimes(
        (layer,), Cost(Curve((0.0,), (2 * MS,))), Curve((0.0, 1.0), (0.0, 0.1 * MS)), host=Curve((0.0,), (0.3 * MS,))
    )

    def measured(self: surveying.Probe, stage: Recorder, shapes: list[Shape], rounds: int) -> dict[Shape, Visited]:
        found = {}
        for shape in shapes:
            load = self._loads[shape]
            compute = stage.layers * layer(load) + truth.visit(load)
            compute += truth.head(len(shape.new)) if shape.sampled else 0.0
            found[shape] = Visited(compute, 0.3 * MS, 0.2 * MS, compute + 0.9 * MS)
        return found

    monkeypatch.setattr(surveying.Probe, "_loop", measured)
    monkeypatch.setattr(surveying, "load_stage", lambda *arguments: Recorder(arguments[2]))
    config = load_config(["model=tiny", "pipeline.max_batch_tokens=128"])
    probe = surveying.Probe(World(), config, resolve(config.model), torch.float32, torch.device("cpu"), max_tokens=128)
    found = probe.times(0.0)
    for load in (
        VisitLoad(64, 64 * 17, sampled=64),
        VisitLoad(16, 16 * 300, sampled=16),
        VisitLoad(prefills=128, pairs=128 * 128, sampled=1),
        VisitLoad(16, 16 * 17, 40, 40 * 40, sampled=17),
    ):
        assert found.seconds(load, (4,), False, True) == pytest.approx(truth.seconds(load, (4,), False, True), rel=1e-6)
    assert found.plan(16) == pytest.approx(0.2 * MS) and found.start_s == pytest.approx(0.4 * MS)


class Recorder:
    """A stage that computes nothing."""

    graph_bytes = 0

    def __init__(self, shard: Shard):
        self.layers = shard.last - shard.first

    def touch(self) -> None:
        pass

    def forward(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "another"])
def test_a_budget_just_above_a_step_is_measured_too(gpu: str) -> None:
    """Of 321 tokens at most, the step before 321 is 320: no two points at the same count."""
    for most in range(1, 1101):
        steps = [count for count in graph_tokens(most, gpu) if count > MOST_ROWS]
        counts = {*(size for size in (1, 2, 16, 64, 256, 512) if size < most), most, *steps}
        curve = stepped({count: count / 1e3 for count in counts}, steps)
        assert all(before < after for before, after in itertools.pairwise(curve.at))
        assert curve(most) == pytest.approx(most / 1e3)


@pytest.mark.parametrize("tokens", [1, 65])
def test_a_stage_is_measured(tokens: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And, where hardware and layout are the same, not again."""
    monkeypatch.setattr(surveying, "LONGEST_S", 0.0)
    monkeypatch.setattr(surveying, "FEWEST", 2)
    kept = tmp_path / "survey.json"

    def measure(*overrides: str) -> StageTimes:
        config = load_config(["model=tiny", f"pipeline.max_batch_tokens={tokens}", *overrides])
        found = survey(World(), config, resolve(config.model), torch.float32, torch.device("cpu"), kept)
        assert found is not None and found.latency_s == 0
        return found.stages[0]

    first = measure()
    seconds = [first.seconds(VisitLoad(n, 20 * n, sampled=n), (4,), True, True) for n in (1, tokens)]
    assert all(0 < took < math.inf for took in seconds)
    written = kept.read_text()
    assert measure("network.latency_ms=9") == first and kept.read_text() == written
    measure("kvcache.page_size=32")
    assert kept.read_text() != written
    assert measure() == first  # what was measured before is still known
    surveying.keep_pace(kept, [2.0])
    assert measure() == replace(first, slow=2.0) and measure("kvcache.page_size=32").slow == 1
    load = VisitLoad(tokens, tokens, sampled=tokens)
    assert measure().compute_s(load, (4,), True) == first.compute_s(load, (4,), True)
    assert first.compute_s(load, (4,), True) < first.seconds(load, (4,), True, True)
    assert measure().seconds(load, (4,), True, True) > first.seconds(load, (4,), True, True)
    kept.write_text(written[:100])  # cut short
    assert measure().layers[0].tokens.at == first.layers[0].tokens.at


def test_a_single_rank_has_no_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for latency in (0, 64):
        words = ["model=tiny", "ranks=1", "workload.source=fixed100:64:0", f"network.latency_ms={latency}"]
        monkeypatch.setattr(sys, "argv", ["plan", *words])
        assert deserve.plan.main() == 0
        printed.append(capsys.readouterr().out.rpartition("planned in")[0])
    assert printed[0] == printed[1]


@pytest.mark.parametrize("extra", [[], ["kv_memory_gb=4"]])
def test_plan_program_needs_no_machine(
    extra: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "model=llama-3-70b", "model.weights=dummy", "ranks=8", "network.latency_ms=64", *extra]
    monkeypatch.setattr(sys, "argv", words)
    assert deserve.plan.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:9]] == list("01234567")
    assert sum(int(line.split()[1]) for line in lines[1:9]) == 80
    assert any("predicted" in line for line in lines)
    monkeypatch.setattr(sys, "argv", [*words, "stage.tflops=0"])
    assert deserve.plan.main() == 2 and "stage.tflops=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        (
            "0::/job/step",
            {"job/memory.max": "1000", "job/memory.current": "300", "job/memory.stat": "inactive_file 50"},
            750,
        ),
        ("0::/job", {"job/memory.max": "max", "job/memory.stat": "anon 3"}, math.inf),
        (
            "4:cpu,memory:/job\n0::/",
            {
                "memory/job/memory.limit_in_bytes": "500",
                "memory/job/memory.usage_in_bytes": "700",
                "memory/job/memory.stat": "cache 9\ntotal_inactive_file 1",
            },
            0,
        ),
        ("3:cpuset:/\n", {}, math.inf),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], left: float) -> None:
    (tmp_path / "self").write_text(groups)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert left_by_control_groups(tmp_path / "self", tmp_path) == left
    assert left_by_control_groups(tmp_path / "none", tmp_path) == math.inf
    assert 0 < available_memory() <= psutil.virtual_memory().total


# -- swapping


def far_and_short(page_ms: float) -> Machine:
    """Two devices far apart, with a bus that brings in a page of a layer in `page_ms`."""
    on = machine(2, latency_ms=100)
    times = replace(on.stages[0], page_s=page_ms * MS, ahead=True)
    return replace(on, stages=(times, times), host_memory=10**9)


SHORT = "kvcache.gpu_memory_gb=0.0005"  # 122 pages of 16 tokens: 61 sequences of 32


@pytest.mark.usefixtures("best_plan")
def test_short_memory_is_swapped_as_far_as_the_bus_allows() -> None:
    requests, free = lengths(4096), far_and_short(0.0)
    without = chosen(requests, free, SHORT, "kvcache.swap_pages=0")
    assert without.bound == "KV memory"
    planned = [chosen(requests, far_and_short(page_ms), SHORT) for page_ms in (0.001, 0.1, 1.0)]
    pages = [plan.swap_pages for plan in planned]
    assert pages[0] > pages[1] > pages[2] > 0
    rates = [plan.predicted or 0.0 for plan in planned]
    assert rates[0] > rates[1] > rates[2] >= (without.predicted or 0.0)


def test_suspensions_and_swapped_pages_take_their_time() -> None:
    requests = lengths(256)
    made = plan(2, 4, 16, swap_pages=20, main_pages=60, host_height=10)
    rates = [simulated(made, requests, far_and_short(page_ms)).tokens_per_s for page_ms in (0.0, 1.0, 10.0)]
    assert rates[0] > rates[1] > rates[2]


def test_main_pages_set_by_hand_leave_the_rest_to_the_slab() -> None:
    """22 pages, in which the slab has room for twice as many: of half of the layers."""
    made = chosen(lengths(4096), far_and_short(0.001), SHORT, "kvcache.main_pages=100")
    assert made.main_pages == 100 and 0 < made.swap_pages <= 44


def test_swap_pages_must_fit_host_memory() -> None:
    on = replace(far_and_short(0.001), host_memory=10**6)
    with pytest.raises(UserError, match=r"kvcache.swap_pages=60 of \d+ rounds take .* of host memory"):
        chosen(lengths(4096), on, SHORT, "kvcache.swap_pages=60", "pipeline.rounds=20")


def test_frames_that_arrive_on_a_device_take_memory_from_its_pages() -> None:
    near = replace(far_and_short(0.0), memory=(4 * 10**7,) * 2)
    far = replace(near, receives_on_device=True, hidden_bytes=1000)
    by_hand = ["pipeline.rounds=50", "pipeline.micro_batch_size=64", "kvcache.swap_pages=0"]
    pages = [chosen(lengths(10**4), on, *by_hand).main_pages for on in (near, far)]
    assert 0 < pages[1] < pages[0]
