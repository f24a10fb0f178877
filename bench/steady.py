"""Steady-state throughput of jobs that would take long: each runs for a while, and its last seconds count.

    python -m bench.steady --ranks 2 --seconds 90 --window 40 --cell "0 ms: network.latency_ms=0" \
        --cell "64 ms: network.latency_ms=64" [--profile 60] [key=value ...]

All cells come from one process group. `--seconds` counts from the first visit, `--window` back from there. Overrides
hold for all cells. `--profile S` records the device's kernels for half a second, S seconds after the first visit, and
lists the pauses between them and where the time goes. Writes steady.json and steady.md into `--output`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deserve.comm.world import World
from deserve.config import load_config
from deserve.report.progress import Progress
from deserve.run import run

Cell = dict[str, Any]
PROFILED_S = 0.5
PAUSE_US = 5  # shorter ones are those of any two kernels that follow each other


@contextmanager
def started(seconds: float, profile: tuple[float, Path] | None) -> Iterator[None]:
    """Stop the job that runs meanwhile `seconds` after its first visit, as SIGTERM does, and `profile` it before."""
    begin, timers = Progress.start, []

    def start(progress: Progress) -> None:
        begin(progress)
        timers.append(threading.Timer(seconds, os.kill, (os.getpid(), 15)))
        if profile is not None:
            timers.append(threading.Timer(profile[0], profile_visits, (profile[1],)))
        for timer in timers:
            timer.start()

    Progress.start = start
    try:
        yield
    finally:
        Progress.start = begin
        for timer in timers:
            timer.cancel()


def profile_visits(path: Path) -> None:
    """Record this rank's device for half a second: `path`.json, a Chrome trace, and pauses and kernels in `path`.md."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        time.sleep(PROFILED_S)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy HtoD", "nccl"))
    )
    end, pauses = spans[0][1], []
    for first, last, name in spans[1:]:
        if first - end > PAUSE_US:
            pauses.append((first - end, name))
        end = max(end, last)
    whole = end - spans[0][0]
    lines = [f"{len(spans)} kernels in {whole / 1e3:.1f} ms, idle for {sum(us for us, _ in pauses) / whole:.2%} of it"]
    lines += [f"{us:8.0f} us before {name[:90]}" for us, name in sorted(pauses, reverse=True)[:10]]
    took: dict[str, list[float]] = defaultdict(list)
    for first, last, name in spans:
        took[name].append(last - first)
    for name, times in sorted(took.items(), key=lambda entry: -sum(entry[1]))[:25]:
        lines.append(f"{sum(times) / whole:6.1%}, {len(times):6} x {statistics.median(times):7.1f} us {name[:110]}")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))


def measure(world: World, name: str, overrides: list[str], options: argparse.Namespace) -> Cell | None:
    """Run a cell; what came of it, on rank 0."""
    folder = options.output / "".join(letter if letter.isalnum() else "-" for letter in name)
    words = [
        "sampling.ignore_eos=true",
        "sampling.temperature=0",
        "output.resume=false",
        "output.grace_s=0",
        f"output.dir={folder}",
        *options.overrides,
        *overrides,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    profile = (options.profile, folder / "profile") if options.profile else None
    begin = time.monotonic()
    with started(options.seconds, profile):
        run(load_config(words), world)
    if world.rank:
        return None
    metrics = json.loads((folder / "metrics.json").read_text())
    print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    if (folder / "profile.md").exists():
        print((folder / "profile.md").read_text(), flush=True)
    return {"name": name, "overrides": words, "steady": steady(metrics, options.window), **metrics}


def steady(metrics: dict[str, Any], window_s: int) -> float:
    """Output tokens/s of the last `window_s` whole seconds."""
    history = metrics["history"]["output_tokens"][:-1][-window_s:]
    return sum(history) / max(1, len(history))


def table(cells: list[Cell]) -> str:
    """The cells in Markdown."""
    header = ["", "output tokens/s", "of the first", "predicted", "bound", "rounds x size", "main, swap pages", "busy"]
    header += ["bus in, GB/s", "out / in", "waited for pages"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for cell in cells:
        plan, stages = cell["plan"], cell["stages"]
        came = max(stage["swap_in_bytes"] / stage["elapsed_s"] for stage in stages) / 1e9
        out = sum(stage["swap_out_bytes"] for stage in stages) / max(1, sum(stage["swap_in_bytes"] for stage in stages))
        waited = max(stage["waited_for_pages_s"] / max(stage["compute_s"], 1e-9) for stage in stages)
        row = [
            cell["name"],
            f"{cell['steady']:,.0f}",
            f"{cell['steady'] / max(1e-9, cells[0]['steady']):.2f}",
            f"{plan['predicted'] or 0:,.0f}",
            plan["bound"],
            f"{plan['rounds']} x {plan['micro_batch_size']}",
            f"{plan['main_pages']}, {plan['swap_pages']}",
            ", ".join(f"{stage['busy']:.0%}" for stage in stages),
            f"{came:.1f}",
            f"{out:.1%}",
            f"{waited:.1%}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benches of steady states share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ranks", type=int, default=2, help="without torchrun: ranks to launch on this host")
    made.add_argument("--seconds", type=float, default=90, help="of a cell, from its first visit")
    made.add_argument("--window", type=int, default=40, help="its last seconds, which count")
    made.add_argument("--profile", type=float, default=0, help="seconds after the first visit; 0: not")
    made.add_argument("--output", type=Path, default=Path("outputs/steady"))
    made.add_argument("overrides", nargs="*", metavar="key=value", help="for all cells")
    return made


def launched(module: str, ranks: int) -> bool:
    """Whether this process is a rank; if not, start as many of `module`, wait for them and exit."""
    if "RANK" in os.environ:
        return True
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as logs:  # torchrun's own
        command += [f"--log-dir={logs}", "-m", module, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode)


def report(cells: list[Cell], output: Path) -> None:
    """Write and print what there is so far."""
    (output / "steady.json").write_text(json.dumps(cells, indent=2) + "\n")
    (output / "steady.md").write_text(table(cells) + "\n")


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--cell", action="append", required=True, help='"name: key=value key=value"')
    options = options_parser.parse_intermixed_args()
    options.output.mkdir(parents=True, exist_ok=True)
    launched("bench.steady", options.ranks)
    world, cells = World(), []
    for text in options.cell:
        name, _, overrides = text.partition(":")
        cell = measure(world, name.strip(), overrides.split(), options)
        if cell is not None:
            cells.append(cell)
            report(cells, options.output)
    world.leave()
    if cells:
        print(table(cells))


if __name__ == "__main__":
    main()
