"""What `trace=true` costs: the throughput of the same job with and without it.

    python -m bench.trace_overhead [--ranks 2] [--pairs 5] [key=value ...]

Jobs with and without a trace take turns in one process group, so that a slow spell of the machine falls on both. All
run by one plan, and the time to write `trace.json` and the picture is not in either: it follows the last token. The
second figure is what recording a span costs a rank by itself, times the spans of a visit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deserve.comm.world import World
from deserve.config import load_config
from deserve.run import run
from deserve.timeline import Timeline

JOB = ["workload.source=fixed256:64:0", "sampling.max_tokens=64", "sampling.ignore_eos=true", "output.resume=false"]


def span_s(keep: bool, count: int = 100_000) -> float:
    """Seconds of the processor that a span costs."""
    timeline = Timeline(keep)
    begin = time.process_time()
    for _ in range(count):
        with timeline.span("compute", 0):
            pass
    return (time.process_time() - begin) / count


def work(folder: Path, pairs: int, overrides: list[str]) -> None:
    """The jobs, in this process group; a folder for each."""
    world = World()
    for pair in range(pairs + 1):  # the first is the warm-up
        for traced in (False, True) if pair % 2 else (True, False):
            words = [*JOB, *overrides, f"trace={str(traced).lower()}", f"output.dir={folder}/{pair}-{traced}"]
            run(load_config(words), world)
    world.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides or ["model=tiny", "pipeline.rounds=4", "pipeline.micro_batch_size=16"]
    if arguments.folder is not None:
        work(arguments.folder, arguments.pairs, overrides)
        return
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
        command += ["-m", "bench.trace_overhead", f"--folder={name}", f"--pairs={arguments.pairs}", *overrides]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        jobs = {
            traced: [
                json.loads((Path(name) / f"{pair}-{traced}" / "metrics.json").read_text())
                for pair in range(1, arguments.pairs + 1)
            ]
            for traced in (False, True)
        }
        spans = sum(
            event["ph"] == "X"
            for event in json.loads((Path(name) / "1-True" / "trace.json").read_text())["traceEvents"]
        )
    rates = {traced: [job["output_tokens_per_s"] for job in done] for traced, done in jobs.items()}
    ratios = [with_ / without for without, with_ in zip(rates[False], rates[True], strict=True)]
    stages = jobs[True][0]["stages"]
    visits = sum(stage["visits"] for stage in stages)
    visit_s = sum(stage["elapsed_s"] for stage in stages) / visits
    each = span_s(keep=True) - span_s(keep=False)
    print("| job | tokens/s without | with trace | change, median of pairs | recording alone |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {' '.join(overrides)}, {arguments.ranks} ranks | {statistics.median(rates[False]):,.0f} | "
        f"{statistics.median(rates[True]):,.0f} | {100 * (statistics.median(ratios) - 1):+.1f} % | "
        f"{1e6 * each:.2f} us a span, {spans / visits:.1f} spans a visit of {1e3 * visit_s:.2f} ms: "
        f"{100 * each * spans / visits / visit_s:.2f} % |"
    )


if __name__ == "__main__":
    main()
