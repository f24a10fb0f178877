"""CPU time of rank 0's main thread in a visit, by sequences in flight: taking tokens in, planning, encoding.

    python -m bench.scheduling [--rounds 8] [--context 600] [--stop] [--logprobs]

All sequences in flight decode; a few end in each visit and others are admitted in their place. With `--stop` every one
has a stop string, which a thread looks for, and with `--logprobs` five log-probabilities beside each token.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from deserve.batch import Request, SamplingParams, VisitResult, beside_width
from deserve.layout import Layout
from deserve.model.tokenizer import ByteTokenizer
from deserve.scheduler.scheduler import Scheduler
from deserve.text import Detokenizer, StopFinder

ANSWER = 128  # tokens


class Source:
    """Prompts of random length, without end."""

    exhausted = False

    def __init__(self, longest: int, **sampling: Any):
        self._random = np.random.default_rng(0)
        self._longest, self._sampling = longest, sampling
        self.beside = beside_width(sampling.get("logprobs"))

    def poll(self) -> Request:
        prompt = self._random.integers(256, size=self._random.integers(1, self._longest), dtype=np.int32)
        answer = int(self._random.integers(ANSWER // 2, ANSWER))
        return Request("", prompt, SamplingParams(max_tokens=answer, ignore_eos=True, **self._sampling))


def visit_times(in_flight: int, rounds: int, source: Source, context: int, visits: int = 400) -> list[float]:
    """CPU milliseconds of each of the last `visits` visits."""
    size = in_flight // rounds
    pages = in_flight * (-(-(context + ANSWER) // 16) + 1)
    layout = Layout((0,), rounds, size, in_flight, max(512, 2 * size), "decode_first", 16, pages, 0, 0)
    finder = StopFinder(Detokenizer(ByteTokenizer()))
    scheduler = Scheduler(layout, source, eos_ids=(2,), find_cuts=finder, share_prefixes=True)
    times = []
    for visit in range(2 * rounds * ANSWER + visits):
        micro_batch = visit % rounds
        sampled = scheduler.awaited(micro_batch)
        result = VisitResult(np.full(sampled, 65, np.int32), np.zeros((sampled, source.beside), np.int32))
        begin = time.thread_time()
        scheduler.commit(micro_batch, result)
        scheduler.plan(micro_batch)[0].encode()
        times.append(1e3 * (time.thread_time() - begin))
    return times[-visits:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="micro-batches that the sequences are spread over")
    parser.add_argument("--context", type=int, default=600, help="longest prompt, tokens")
    parser.add_argument("--stop", action="store_true", help="every sequence has a stop string")
    parser.add_argument("--logprobs", action="store_true", help="every sequence wants five log-probabilities a token")
    arguments = parser.parse_args()
    sampling = {"stop": ("never",)} if arguments.stop else {}
    sampling |= {"logprobs": 5} if arguments.logprobs else {}
    print("| in flight | in a visit | median ms | 95 % ms |\n| --- | --- | --- | --- |")
    for in_flight, rounds in [(n, r) for r in (1, arguments.rounds) for n in (16, 512, 2048)]:
        times = visit_times(in_flight, rounds, Source(arguments.context, **sampling), arguments.context)
        late = statistics.quantiles(times, n=20)[-1]
        print(f"| {in_flight:,} | {in_flight // rounds:,} | {statistics.median(times):.3f} | {late:.3f} |")


if __name__ == "__main__":
    main()
