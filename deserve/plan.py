"""A plan without a run: `python -m deserve.plan ranks=64 network.latency_ms=80 model=llama-3-70b`.

Needs neither the ranks nor the weights: stage times come from stated rates (`stage.*`), or with `stage.measure=true`
from stages with random weights on this machine.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch

from deserve.comm.coding import coded_bytes
from deserve.comm.world import World
from deserve.config import Config, compose_config, in_range
from deserve.errors import UserError
from deserve.layout import most_sliding, token_budgets
from deserve.model.checkpoint import computes_on_cpu, model_dtype, resolve
from deserve.model.config import ModelConfig
from deserve.model.tokenizer import load_tokenizer
from deserve.model.weights import layer_kinds
from deserve.planner.planner import GB
from deserve.planner.replicas import choose_rings, ring_table
from deserve.planner.survey import over, survey
from deserve.planner.times import LinkTimes, Machine, stated_times
from deserve.run import set_up_device
from deserve.workload import Limits, default_sampling, peek_lengths

AMPLE = 1e18  # bytes


@dataclass
class StageSection:
    """How fast one rank is."""

    bandwidth_gbs: float = 4000.0  # GB/s read from device memory
    tflops: float = 700.0  # in the model's dtype
    time_ms: float | None = None  # of one layer, whatever the visit: overrides both
    bus_gbs: float = 50.0  # GB/s from host memory, while a little goes back
    measure: bool = False  # time one stage on this machine instead


@dataclass
class PlanConfig(Config):
    """`conf/plan.yaml`: a run's configuration and the machine that it would have."""

    ranks: int = 2
    kv_memory_gb: float | None = None  # of one rank, for KV pages; null: memory_gb less the weights
    memory_gb: float = 126.0  # of one rank, for weights and KV pages
    host_memory_gb: float = 64.0  # of one rank, for swap pages and the host pool
    stage: StageSection = field(default_factory=StageSection)


def plan(config: PlanConfig) -> str:
    """The plan of `config` as a table."""
    section = replace(config.model, weights="dummy") if config.model.architecture else config.model
    checkpoint = resolve(section)
    model, measures = checkpoint.config, config.stage.measure
    dtype = model_dtype(config.model, model, measures and computes_on_cpu(config.device))
    limits = Limits(model.vocab_size, model.max_context)
    defaults = default_sampling(config.sampling, checkpoint.generation)
    tokenizer = load_tokenizer(checkpoint, chat_template=config.workload.chat_template)
    lengths = peek_lengths(config, tokenizer, limits, defaults=defaults)
    page_bytes = config.kvcache.page_size * model.kv_spec(dtype, config.kvcache.fp8).token_bytes
    if measures:
        world = World(config.comm.timeout_s)
        measured = survey(world, config, checkpoint, dtype, set_up_device(config, world))
        assert measured is not None
        times, budgets = measured.stages[0], measured.budgets
    else:
        stage = config.stage
        budgets = token_budgets(config.pipeline.max_batch_tokens, gpu=True)
        times = stated_times(
            model,
            dtype,
            stage.bandwidth_gbs * GB,
            stage.tflops * 1e12,
            None if stage.time_ms is None else stage.time_ms / 1e3,
            budgets[-1],
            page_bytes / (stage.bus_gbs * GB),
            config.kvcache.fp8,
        )
    memory = config.memory_gb * GB
    if config.kv_memory_gb is not None:  # however much the weights leave
        memory, config.kvcache.gpu_memory_gb = AMPLE, config.kv_memory_gb
    ranks = config.ranks
    machine = Machine(
        stages=(times,) * ranks,
        links=over([LinkTimes()] * ranks, config.network),
        memory=(int(memory),) * ranks,
        host_memory=int(config.host_memory_gb * GB),
        hidden_bytes=model.hidden_size * dtype.itemsize,
        page_bytes=page_bytes,
        budgets=budgets,
        coded_bytes=coded_bytes(model.hidden_size),
        coded=config.comm.activations == "fp8",
        window=model.window,
        kinds=layer_kinds(model, dtype),
    )
    begin = time.perf_counter()
    rings, why = choose_rings(config, model, dtype, lengths, machine)
    took = time.perf_counter() - begin
    chosen = ring_table([layout for layout, _ in rings], model.num_layers, lengths.exact)
    beside = sequence_pages(config, model, dtype, round(lengths.mean_prompt + lengths.mean_output))
    return "\n".join([*filter(None, [why]), chosen, *filter(None, [beside]), f"planned in {took:.1f} s"])


def sequence_pages(config: PlanConfig, model: ModelConfig, dtype: torch.dtype, tokens: int) -> str:
    """What a sequence of `tokens` tokens holds on all ranks, and what it would without windows; empty if the same."""
    page_size, sliding = config.kvcache.page_size, len(model.sliding(0, model.num_layers))
    page_bytes = page_size * model.kv_spec(dtype, config.kvcache.fp8).token_bytes
    pages = -(-tokens // page_size)
    near = min(pages, most_sliding(model.window, page_size))
    held, without = ((model.num_layers * pages - less) * page_bytes for less in (sliding * (pages - near), 0))
    if held == without:
        return ""
    said = (
        f"a sequence of {tokens:,} tokens holds {held / GB:.2f} GB of KV pages, {without / GB:.2f} GB without windows"
    )
    if config.kv_memory_gb is None:
        return said
    memory = config.ranks * config.kv_memory_gb * GB
    return f"{said}: {int(memory / held)} and {int(memory / without)} of them fill that memory of {config.ranks} ranks"


def load_plan_config(overrides: list[str]) -> PlanConfig:
    """Compose `conf/plan.yaml`. Raises UserError for an unknown key or an impossible value."""
    config = compose_config(overrides, "plan", PlanConfig)
    positive = ["ranks", "kv_memory_gb", "memory_gb", "host_memory_gb"]
    positive += [f"stage.{name}" for name in ("bandwidth_gbs", "tflops", "bus_gbs", "time_ms")]
    for key in positive:
        in_range(key, attrgetter(key)(config), 0, exclusive=True)
    return config


def main() -> int:
    """Exit status: 0 done, 1 no such plan, 2 a mistake in the configuration."""
    parser = argparse.ArgumentParser(prog="deserve.plan", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as ranks=8 or network.latency_ms=64")
    try:
        config = load_plan_config(parser.parse_args().overrides)
    except UserError as error:
        print(f"deserve: error: {error}", file=sys.stderr)
        return 2
    try:
        print(plan(config))
    except UserError as error:
        print(f"deserve: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
