"""How many rings the ranks of a job form, and the plan of each.

More rings have fewer links to wait for and more copies of the weights, which leave less memory for KV pages.
"""

from collections.abc import Sequence
from dataclasses import astuple, replace

import torch

from deserve.config import Config
from deserve.errors import UserError
from deserve.layout import Layout
from deserve.model.config import ModelConfig
from deserve.planner.planner import EQUAL, choose_plan, table
from deserve.planner.times import LinkTimes, Machine
from deserve.workload import Lengths


def choose_rings(
    config: Config, model: ModelConfig, dtype: torch.dtype, lengths: Lengths, machine: Machine
) -> tuple[list[tuple[Layout, Machine]], str]:
    """The layout of each ring and its part of `machine`, and the table behind the choice of `pipeline.replicas=auto`.

    Raises UserError, naming the key, where that number of rings cannot work.
    """
    wanted, ranks = config.pipeline.replicas, machine.ranks
    counts = [count for count in range(1, ranks + 1) if ranks % count == 0] if wanted == "auto" else [wanted]
    if ranks % counts[0]:
        raise UserError(
            f"pipeline.replicas={wanted} does not divide {ranks} ranks: all rings have as many ranks; start a "
            "multiple of it"
        )
    plans: dict[int, list[tuple[Layout, Machine]]] = {}
    rates: dict[int, float] = {}
    refused: dict[int, UserError] = {}
    for count in counts:
        try:
            plans[count], rates[count] = _planned(config, model, dtype, lengths, machine, count)
        except UserError as error:
            refused[count] = error
    if not plans:
        raise refused[counts[0]]
    # Of those as good as each other the most rings, which have the fewest links.
    chosen = max(count for count in plans if rates[count] >= (1 - EQUAL) * max(rates.values()))
    if len(counts) == 1:
        return plans[chosen], ""
    lines = ["rings     ranks each  output tokens/s, simulated"]
    for count in counts:
        rate, why = f"{'none':>12}", str(refused.get(count, ""))
        if count in plans:
            rate, why = f"{rates[count]:12,.1f}", f"bound by {plans[count][0][0].bound}"
        lines.append(f"{count:<8}  {ranks // count:10}  {rate}  {why}{' <- chosen' * (count == chosen)}")
    return plans[chosen], "\n".join(lines)


def ring_table(layouts: Sequence[Layout], layers: int, exact: bool = True) -> str:
    """The layout of each ring for the eye, alike ones together; the only ring's as `table` has it."""
    if len(layouts) == 1:
        return table(layouts[0], layers, exact)
    lines = []
    size = len(layouts[0].partition)
    for layout in dict.fromkeys(layouts):
        alike = [number for number, each in enumerate(layouts) if each == layout]
        which = f"ring {alike[0]}" if len(alike) == 1 else f"rings {', '.join(map(str, alike))}, each"
        lines += [f"{which} of {size} ranks, the first from rank {alike[0] * size} on:", table(layout, layers, exact)]
    rates = [layout.predicted for layout in layouts]
    if None not in rates:
        lines.append(f"{len(layouts)} rings: predicted {sum(filter(None, rates)):,.1f} output tokens/s in sum")
    return "\n".join(lines)


def _planned(
    config: Config, model: ModelConfig, dtype: torch.dtype, lengths: Lengths, machine: Machine, replicas: int
) -> tuple[list[tuple[Layout, Machine]], float]:
    """Each ring's layout and machine, and output tokens/s of all of them."""
    config, lengths = _share(config, replicas), part(lengths, replicas)
    rings = _rings(machine, replicas)
    if replicas > 1 and machine.coded and not any(link.far for ring in rings for link in ring.links[:-1]):
        raise UserError(
            f"comm.activations={config.comm.activations} codes hidden states between hosts, and pipeline.replicas="
            f"{replicas} makes rings that are on one host each: leave it at auto"
        )
    found = {ring: choose_plan(config, model, dtype, lengths, ring) for ring in dict.fromkeys(rings)}
    return [(found[ring][0], ring) for ring in rings], sum(found[ring][1] for ring in rings)


def _share(config: Config, replicas: int) -> Config:
    """What `config` leaves to one ring. Raises UserError where that is nothing."""
    stated = config.workload.concurrency
    if stated == "auto" or replicas == 1:
        return config
    if stated < replicas:
        raise UserError(f"workload.concurrency={stated} leaves some of {replicas} rings without a request: raise it")
    return replace(config, workload=replace(config.workload, concurrency=stated // replicas))


def part(lengths: Lengths, replicas: int) -> Lengths:
    """One ring's part of the workload."""
    if replicas == 1:
        return lengths
    count = None if lengths.count is None else -(-lengths.count // replicas)
    return replace(lengths, count=count, sizes=lengths.sizes[::replicas])


def _rings(machine: Machine, replicas: int) -> list[Machine]:
    """The rings, those of ranks that are alike with the least memory and the longest links of any, and so equal."""
    size = machine.ranks // replicas
    rings = [machine.ring(number * size, size) for number in range(replicas)]
    kinds = [tuple((stage.layers, stage.visit) for stage in ring.stages) for ring in rings]
    worst = {}
    for kind in dict.fromkeys(kinds):
        alike = [ring for ring, other in zip(rings, kinds, strict=True) if other == kind]
        links = zip(*([astuple(link) for link in ring.links] for ring in alike), strict=True)
        worst[kind] = replace(
            alike[0],
            memory=tuple(map(min, zip(*(ring.memory for ring in alike), strict=True))),
            links=tuple(LinkTimes(*map(max, zip(*each, strict=True))) for each in links),
        )
    return [worst[kind] for kind in kinds]
