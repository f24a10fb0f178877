"""What scheduling costs rank 0 in a visit, by the sequences in flight: taking tokens in, planning, encoding.

    python -m bench.scheduling [--rounds 8] [--context 600]

All sequences in flight decode; a few end in each visit and others are admitted in their place.
"""

import argparse
import statistics
import time

import numpy as np

from deserve.batch import Request, SamplingParams, VisitResult
from deserve.layout import Layout
from deserve.scheduler.scheduler import Scheduler

ANSWER = 128  # tokens


class Source:
    """Prompts of random length, without end."""

    exhausted = False

    def __init__(self, longest: int):
        self._random = np.random.default_rng(0)
        self._longest = longest

    def poll(self) -> Request:
        prompt = np.zeros(self._random.integers(1, self._longest), np.int32)
        answer = int(self._random.integers(ANSWER // 2, ANSWER))
        return Request("", prompt, SamplingParams(max_tokens=answer, ignore_eos=True))


def visit_times(in_flight: int, rounds: int, context: int, visits: int = 400) -> list[float]:
    """Milliseconds of each of the last `visits` visits."""
    size = in_flight // rounds
    pages = in_flight * (-(-(context + ANSWER) // 16) + 1)
    layout = Layout((0,), rounds, size, in_flight, max(512, 2 * size), "decode_first", 16, pages, 0, 0)
    scheduler = Scheduler(layout, Source(context), eos_ids=(2,))
    times = []
    for visit in range(2 * rounds * ANSWER + visits):
        micro_batch = visit % rounds
        result = VisitResult(np.zeros(scheduler.awaited(micro_batch), np.int32))
        begin = time.perf_counter()
        scheduler.commit(micro_batch, result)
        scheduler.plan(micro_batch)[0].encode()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[-visits:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="micro-batches that the sequences are spread over")
    parser.add_argument("--context", type=int, default=600, help="longest prompt, tokens")
    arguments = parser.parse_args()
    print("| in flight | in a visit | median ms | 95 % ms |\n| --- | --- | --- | --- |")
    for in_flight, rounds in [(16, 1), (256, 1), (2048, 1)] + [(n, arguments.rounds) for n in (16, 256, 2048)]:
        times = visit_times(in_flight, rounds, arguments.context)
        late = statistics.quantiles(times, n=20)[-1]
        print(f"| {in_flight:,} | {in_flight // rounds:,} | {statistics.median(times):.3f} | {late:.3f} |")


if __name__ == "__main__":
    main()
