"""How long a sequence waits from one token to the next, by the rounds that share the ring."""

from dataclasses import replace
from functools import lru_cache

from deserve.layout import Layout
from deserve.planner.times import Machine, Stages, VisitLoad, outside
from deserve.scheduler.drafts import CycleTime


def cycle_times(layout: Layout, machine: Machine, layers: int, context: float) -> CycleTime:
    """How long a cycle takes.

    All sequences decode, with `context` tokens each, on `machine` laid out as in `layout`. A visit comes as soon as the
    last one of its round is back, unless visits of other rounds queue before the slowest rank or link.
    """
    # What is sampled beside rows are drafts, which admit no request.
    measured = tuple(replace(times, request_s=0.0) for times in machine.stages)
    stages = Stages(replace(machine, stages=measured), layout.partition, layers)

    @lru_cache(4096)
    def cycle_s(rounds: int, sequences: int, prompts: int = 0, drafts: int = 0, drafting_s: float = 0.0) -> float:
        rows = -(-sequences // rounds)
        beside = drafts if machine.stages[0].ahead else 0  # on a CPU each draft reads its row's pages by itself
        alone = rows + drafts - beside
        load = VisitLoad(
            decodes=alone,
            decode_kv=alone * context,
            prefills=prompts + beside,
            pairs=(prompts / 2 + beside) * context,
            sampled=rows + drafts,
            outside_kv=alone * outside(context, machine.window),
            outside_pairs=(prompts / 2 + beside) * outside(context, machine.window),
        )
        return stages.cycle(load, drafting_s).seconds(rounds)

    return cycle_s
