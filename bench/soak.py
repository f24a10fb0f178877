"""A job of 2,000 requests whose ranks are killed at random moments, and the memory of an undisturbed one.

    python bench/soak.py [--kills 20] [--ranks 3] [--requests 2000] [--seed 0] [--out outputs/soak]

1. an undisturbed job: its answers are the truth, and the memory of each of its ranks is sampled;
2. the same job under `torchrun --max-restarts`: again and again a random rank is killed (SIGKILL) a random moment after
   the job has gone on, until `--kills` have died; then the rest runs;
3. every request must have one line of results, with the same text as in the undisturbed job.

Prints a Markdown table and writes `soak.json` into `--out`. Exit status 1 if anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from deserve.report.results import failure

STARTUP_S = 120.0  # for the ranks to come up on a busy machine
GROWTH_MB = 16.0  # of a rank between the second quarter of the undisturbed job and its end: more is a leak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/soak"))
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    # Answers of 60 tokens, 32 at a time, over links of 10 ms: some minutes of work, in pieces much longer than a start.
    job = [
        "model=tiny",
        f"workload.source=fixed{options.requests}:24:16",
        "sampling.max_tokens=60",
        "sampling.ignore_eos=true",
        "network.latency_ms=10",
        "pipeline.rounds=4",
        "pipeline.micro_batch_size=4",
    ]
    memory: list[dict[int, float]] = []
    calm = start(options.ranks, [*job, f"output.dir={options.out}/calm"], 0, options.out / "calm.log")
    begin = time.monotonic()
    while calm.poll() is None:
        memory.append({rank: process.memory_info().rss / 1e6 for rank, process in ranks_of(calm).items()})
        time.sleep(1)
    calm_s = time.monotonic() - begin
    truth, _ = read(options.out / "calm")
    print(f"undisturbed: exit status {calm.returncode}, {len(truth)} answers in {calm_s:.0f} s", flush=True)

    killed = soak(options, job)
    texts, repeated = read(options.out / "soak")
    running = [sample for sample in memory if len(sample) == options.ranks]
    early, late = running[len(running) // 4 : len(running) // 2], running[-len(running) // 4 :]
    growth = {
        rank: max(sample[rank] for sample in late) - max(sample[rank] for sample in early)
        for rank in range(options.ranks)
    }
    expected = {f"fixed-{index}" for index in range(options.requests)}
    figures: dict[str, Any] = {
        "requests": options.requests,
        "ranks": options.ranks,
        "kills": len(killed["ranks"]),
        "kills_by_rank": [killed["ranks"].count(rank) for rank in range(options.ranks)],
        "starts": killed["starts"],
        "exit_status": killed["status"],
        "undisturbed_s": round(calm_s, 1),
        "disturbed_s": round(killed["elapsed_s"], 1),
        "answers": len(texts),
        "twice": len(repeated),
        "missing": len(expected - texts.keys()),
        "other_text": sum(texts[name] != truth.get(name) for name in texts),
        "rss_mb": [round(max(sample[rank] for sample in late)) for rank in range(options.ranks)],
        "rss_growth_mb": [round(growth[rank], 1) for rank in range(options.ranks)],
        "rss_sampled_s": len(running),
    }
    (options.out / "soak.json").write_text(json.dumps(figures, indent=2) + "\n")
    print("\n| figure | value |\n| --- | --- |")
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    wrong = [name for name in ("twice", "missing", "other_text", "exit_status") if figures[name]]
    wrong += ["undisturbed"] if truth.keys() != expected else []
    wrong += ["rss_growth_mb"] if max(growth.values()) > GROWTH_MB else []
    print(f"\nwrong: {', '.join(wrong) or 'nothing'}")
    return 1 if wrong else 0


def soak(options: argparse.Namespace, job: list[str]) -> dict[str, Any]:
    """Run the job and kill its ranks. Kills come in the start (while weights load or links open) as well as later."""
    chance = random.Random(options.seed)
    output = options.out / "soak"
    process = start(
        options.ranks, [*job, f"output.dir={output}"], options.kills + options.ranks, options.out / "soak.log"
    )
    begin = time.monotonic()
    killed: list[int] = []
    seen: set[int] = set()
    while len(killed) < options.kills and process.poll() is None:
        ranks = wait_for_ranks(process, options.ranks, seen)
        if ranks is None:
            break
        seen |= {rank.pid for rank in ranks.values()}
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, 10))  # at any moment of the start or of the work
        else:
            wait_for_lines(process, output, line_count(output) + chance.randint(1, options.requests // options.kills))
        victim = chance.randrange(options.ranks)
        with contextlib.suppress(psutil.Error):
            ranks[victim].kill()
            killed.append(victim)
            print(f"kill {len(killed)}: rank {victim} at {line_count(output)} answers", flush=True)
    status = process.wait()
    log = (options.out / "soak.log").read_text(errors="replace")
    return {
        "ranks": killed,
        "status": status,
        "elapsed_s": time.monotonic() - begin,
        "starts": log.count(" in flight, policy "),
    }


def start(ranks: int, overrides: list[str], restarts: int, log: Path) -> subprocess.Popen[bytes]:
    """The job under torchrun, its output in `log`."""
    launcher = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "deserve.run", *overrides]
    # Idle threads sleep rather than spin: there are more ranks than cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The rank processes that live."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE and "RANK" in (environment := child.environ()):
                    found[int(environment["RANK"])] = child
    return found


def wait_for_ranks(process: subprocess.Popen[bytes], count: int, seen: set[int]) -> dict[int, psutil.Process] | None:
    """The ranks of the next start, None if there is none."""
    deadline = time.monotonic() + STARTUP_S
    while process.poll() is None and time.monotonic() < deadline:
        ranks = ranks_of(process)
        if len(ranks) == count and not any(rank.pid in seen for rank in ranks.values()):
            return ranks
        time.sleep(0.05)
    return None


def wait_for_lines(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    """Wait until there are `count` lines of results."""
    deadline = time.monotonic() + STARTUP_S
    while process.poll() is None and line_count(output) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def line_count(output: Path) -> int:
    path = output / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read(output: Path) -> tuple[dict[str, str], list[str]]:
    """The text of each request (the last line counts), and the `custom_id`s that have a line after an answer."""
    texts: dict[str, str] = {}
    repeated = []
    for line in (output / "results.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        if texts.get(entry["custom_id"], "error") != "error":
            repeated.append(entry["custom_id"])
        texts[entry["custom_id"]] = "error" if failure(entry) else entry["response"]["body"]["choices"][0]["text"]
    return texts, repeated


if __name__ == "__main__":
    sys.exit(main())
