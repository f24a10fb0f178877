"""Chooses rounds, micro-batch size, concurrency, pages and the layer split."""

from deserve.config import Config
from deserve.errors import UserError
from deserve.model.config import ModelConfig
from deserve.planner.plan import Plan, parse_partition
from deserve.workload import Lengths


def choose_plan(
    config: Config, model: ModelConfig, lengths: Lengths, ranks: int, kv_bytes: int, page_bytes: int
) -> Plan:
    """The plan for `lengths` on `ranks` ranks with `kv_bytes` of KV memory each; a page takes `page_bytes` a layer."""
    pipeline, kv = config.pipeline, config.kvcache
    if model.num_layers < ranks:
        raise UserError(f"{ranks} ranks, but the model has only {model.num_layers} layers: start fewer ranks")
    if pipeline.partition == "auto":
        partition = tuple(round(rank * model.num_layers / ranks) for rank in range(ranks))
    else:
        partition = parse_partition(pipeline.partition, ranks, model.num_layers)
    rounds = ranks if pipeline.rounds == "auto" else pipeline.rounds
    wanted = lengths.count or 10**9
    if config.workload.concurrency != "auto":
        wanted = min(wanted, config.workload.concurrency)
    size = pipeline.micro_batch_size
    if size == "auto":
        size = max(1, min(256, -(-wanted // rounds)))
    concurrency = max(1, min(wanted, rounds * size))
    most_layers = max(b - a for a, b in zip(partition, (*partition[1:], model.num_layers), strict=True))
    main = kv.main_pages
    if main == "auto":
        per_sequence = -(-min(lengths.max_total, model.max_context) // kv.page_size)
        main = min(kv_bytes // (page_bytes * most_layers), concurrency * per_sequence)
    return Plan(
        partition=partition,
        rounds=rounds,
        micro_batch_size=size,
        concurrency=concurrency,
        max_batch_tokens=pipeline.max_batch_tokens,
        policy=pipeline.policy,
        page_size=kv.page_size,
        main_pages=main,
        swap_pages=0,
        host_height=kv.buddy_height,
    )
