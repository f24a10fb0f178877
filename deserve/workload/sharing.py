"""How much prompts have in common."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

from deserve.batch import IntArray, shared_tokens

WINDOW = 4096  # lines that are compared
KEY_BYTES = 1 << 14  # of a line's prompt
RUNS = 8


def alike(lines: Iterator[tuple[int, bytes | None]], sample: int) -> list[list[int]]:
    """The numbers of `sample` of the first `lines`, as runs of neighbours in the order of their prompts."""
    keys = []
    for number, raw in islice(lines, WINDOW):
        raw = raw or b""
        begin = max(raw.find(b'"messages"'), raw.find(b'"prompt"'), 0)
        keys.append((raw[begin : begin + KEY_BYTES], number))
    order = [number for _, number in sorted(keys)]
    length = -(-sample // RUNS)
    if len(order) <= sample:
        return [order]
    return [order[(len(order) - length) * run // (RUNS - 1) :][:length] for run in range(RUNS)]


def sharing(runs: Sequence[Sequence[IntArray]], page_size: int) -> tuple[float, float]:
    """What the prompts of `runs` share, as `Lengths` has it: tokens in whole pages, and their readers.

    All prompts of a run are compared. Of several runs, the prompts before and behind each are not known.
    """
    shared = computed = 0.0
    count = 0
    for run in runs:
        prompts = sorted(run, key=lambda prompt: prompt.tobytes())
        both = [shared_tokens(one, other) // page_size for one, other in pairwise(prompts)]
        for index in range(len(runs) > 1, len(prompts)):
            before, behind = both[index - 1] if index else 0, both[index] if index < len(both) else 0
            own = (len(prompts[index]) - 1) // page_size  # the last token is always computed
            shared += min(own, max(before, behind))
            computed += max(0, min(own, behind) - before)
            count += 1
    return page_size * shared / max(1, count), shared / computed if computed else math.inf
