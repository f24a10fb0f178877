"""What the planner predicts against what a run measures, as a Markdown table.

    python -m bench.prediction [--repeats 3] [--only tiny]

Jobs on the same number of ranks share one process group. Every job is planned (measurement of the stages included)
and run anew in each repeat; the table has the median of the ratios. Jobs last some seconds, so that neither their end
nor a moment's disturbance makes the figure. Jobs during which other programs kept the
processors busy are repeated; where none was left alone, the least disturbed one counts, marked with an asterisk.
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
from typing import Any

import psutil

from deserve.comm.world import World
from deserve.config import load_config
from deserve.run import run

DISTURBED = 0.1  # cores that other programs may keep busy during a job
COMMON = ["device=cpu", "sampling.ignore_eos=true", "sampling.temperature=0", "output.resume=false"]

# ranks, workload (count:prompt:variation), tokens of answer, other overrides
SETTINGS: list[tuple[int, str, int, str]] = [
    (1, "fixed2048:64:0", 64, "model=tiny"),
    (1, "fixed96:64:0", 48, ""),
    (1, "fixed300:420:0", 16, "workload.shared_tokens=400"),
    (2, "fixed4096:64:0", 64, "model=tiny"),
    (2, "fixed4096:64:0", 64, "model=tiny network.latency_ms=20"),
    (2, "fixed1024:64:0", 64, "model=tiny network.latency_ms=20 pipeline.rounds=2"),
    (2, "fixed3000:128:32", 48, "model=tiny network.latency_ms=20 pipeline.policy=decode_first"),
    (2, "fixed3000:48:16", 48, "model=tiny pipeline.policy=vanilla"),
    (2, "fixed512:64:0", 64, "model=tiny network.latency_ms=10 network.bandwidth_mbps=20"),
    (2, "fixed96:64:0", 48, ""),
    (2, "fixed96:48:16", 48, "pipeline.policy=vanilla"),
    (2, "fixed96:64:0", 48, "network.latency_ms=64"),
    (2, "fixed96:64:0", 48, "network.latency_ms=32 network.bandwidth_mbps=100"),
    (3, "fixed4096:64:0", 64, "model=tiny network.latency_ms=10"),
    (3, "fixed1024:64:0", 64, "model=tiny network.latency_ms=40 pipeline.rounds=3"),
    (4, "fixed4096:64:0", 64, "model=tiny"),
    (4, "fixed1024:64:0", 64, "model=tiny network.latency_ms=40"),
]


def work(settings: list[int], repeats: int, attempts: int, results: Path) -> None:
    """The jobs `settings` on this process group; rank 0 appends a line of JSON per job to `results`."""
    wanted = False
    world = World(timeout_s=60)
    try:
        for index in settings * attempts:
            if world.rank == 0:
                wanted = quiet_jobs(results, index) < repeats
            if not world.share("wanted", world.rank == 0 and wanted):
                continue
            begun = others_seconds(), time.monotonic()
            _, source, answer, overrides = SETTINGS[index]
            folder = world.share(f"folder{index}", tempfile.mkdtemp() if world.rank == 0 else None)
            words = [*COMMON, *overrides.split(), f"workload.source={source}", f"sampling.max_tokens={answer}"]
            run(load_config([*words, f"output.dir={folder}"]), world)
            if world.rank == 0:
                metrics: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
                others = (others_seconds() - begun[0]) / (time.monotonic() - begun[1])
                with results.open("a") as file:
                    file.write(json.dumps({"index": index, "others": others, **metrics}) + "\n")
    finally:
        world.leave()


def others_seconds() -> float:
    """Processor seconds that this machine has spent on anything but this benchmark."""
    total = psutil.cpu_times()
    launcher = psutil.Process(os.getppid())
    own = [process.cpu_times() for process in (launcher, *launcher.children(recursive=True))]
    return total.user + total.nice + total.system - sum(times.user + times.system for times in own)


def quiet_jobs(results: Path, index: int) -> int:
    """How often setting `index` has run without being disturbed."""
    lines = results.read_text().splitlines() if results.exists() else []
    return sum(job["index"] == index and job["others"] < DISTURBED for job in map(json.loads, lines))


def row(index: int, jobs: list[dict[str, Any]]) -> str:
    """A line of the table."""
    ranks, source, answer, overrides = SETTINGS[index]
    quiet = [job for job in jobs if job["others"] < DISTURBED]
    jobs = quiet or [min(jobs, key=lambda job: job["others"])]
    ratios = [job["plan"]["predicted_output_tokens_per_s"] / job["output_tokens_per_s"] for job in jobs]
    middle = jobs[ratios.index(statistics.median_low(ratios))]
    plan = middle["plan"]
    cells = [
        str(ranks),
        middle["config"]["model"]["name"],
        source.removeprefix("fixed") + f", {answer} out",
        " ".join(word for word in overrides.split() if not word.startswith("model=")) or "-",
        f"{plan['rounds']} x {plan['micro_batch_size']}",
        f"{plan['predicted_output_tokens_per_s']:,.0f}",
        f"{middle['output_tokens_per_s']:,.0f}",
        f"{100 * (statistics.median_low(ratios) - 1):+.0f} %" + ("" if quiet else " *"),
        plan["bound"],
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attempts", type=int, default=9, help="jobs per setting until `repeats` were undisturbed")
    parser.add_argument("--only", default="", help="settings whose overrides contain this")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(json.loads(arguments.jobs), arguments.repeats, arguments.attempts, Path(arguments.results))
        return
    print("| ranks | model | requests | network, policy | rounds x size | predicted | measured | error | bound |")
    print("| --- " * 9 + "|")
    for ranks in sorted({setting[0] for setting in SETTINGS}):
        chosen = [i for i, s in enumerate(SETTINGS) if s[0] == ranks and arguments.only in s[3]]
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results"
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
            command += [
                "-m",
                "bench.prediction",
                f"--repeats={arguments.repeats}",
                f"--attempts={arguments.attempts}",
                f"--jobs={json.dumps(chosen)}",
            ]
            done = subprocess.run([*command, f"--results={results}"], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            jobs = [json.loads(line) for line in results.read_text().splitlines()]
        for index in chosen:
            print(row(index, [job for job in jobs if job["index"] == index]), flush=True)


if __name__ == "__main__":
    main()
