"""Throughput by link latency: "pipeline only" (as many rounds as ranks, no swapping) beside what the planner chooses.

    python -m bench.latency_sweep --model smollm2-135m --ranks 2 --kv-gb 0.1 --output outputs/sweep [key=value ...]

Writes sweep.md, sweep.json and sweep.png. All cells come from one process group, launched here, or by torchrun where
the ranks are on several hosts (`torchrun ... -m bench.latency_sweep --output ...`). Every cell is a whole job: planned,
loaded and run anew, under the same cap on KV memory. A job's requests are as many as keep it at about `--cell-s`
seconds at the rate of the cell before, but at least two waves of those in flight, at most `--requests`.

"Expected" for pipeline only is N / (N/r + S*L): S ranks, L one-way latency, N sequences in flight, r the rate at 0 ms.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deserve.comm.world import World
from deserve.config import load_config
from deserve.run import run

LATENCIES_MS = (0, 16, 32, 64, 128, 256)
PIPELINE_ONLY, PLANNED = SYSTEMS = ("pipeline only", "planned")
KEPT = ("output_tokens_per_s", "total_tokens_per_s", "requests", "errors", "elapsed_s", "stages", "plan")

Cell = dict[str, Any]


def work(options: argparse.Namespace) -> list[Cell]:
    """All cells, on this process group; they are on rank 0."""
    world = World()
    cells: list[Cell] = []
    for system in SYSTEMS:
        before: Cell | None = None
        for latency in options.latencies:
            name = f"{system.replace(' ', '-')}-{latency:g}ms"
            requests = world.share(f"{name}/requests", requests_for(before, latency, options))
            folder = options.output / name
            only = ["kvcache.swap_pages=0", f"pipeline.rounds={world.size}"] if system == PIPELINE_ONLY else []
            words = [
                f"model={options.model}",
                f"workload.source=fixed{requests}:{options.prompt}:0",
                f"sampling.max_tokens={options.answer}",
                "sampling.ignore_eos=true",
                "sampling.temperature=0",
                f"network.latency_ms={latency:g}",
                f"output.dir={folder}",
                "output.resume=false",
                *([f"kvcache.gpu_memory_gb={options.kv_gb}"] if options.kv_gb else []),
                *options.overrides,
                *(only or options.planned.split()),
            ]
            run(load_config(words), world)
            if world.rank == 0:
                metrics = json.loads((folder / "metrics.json").read_text())
                before = {"system": system, "latency_ms": latency, **{key: metrics[key] for key in KEPT}}
                cells.append(before)
                (options.output / "sweep.json").write_text(json.dumps(cells, indent=2) + "\n")
    world.leave()
    return cells


def requests_for(before: Cell | None, latency: float, options: argparse.Namespace) -> int:
    """How many requests the next cell of a system is to answer. `before` is the one at the latency below."""
    if before is None:
        return int(options.requests)
    rate = before["output_tokens_per_s"]
    enough = rate * options.cell_s / options.answer
    needed = in_flight(before, options)
    if before["system"] == PLANNED:  # at the same rate, a longer trip has more of them under way
        needed += rate * len(before["stages"]) * (latency - before["latency_ms"]) / 1e3
    return round(min(options.requests, max(enough, 2 * needed)))


def in_flight(cell: Cell, options: argparse.Namespace) -> float:
    """Sequences in flight at once: as many as the plan admits and the pages hold."""
    plan = cell["plan"]
    tokens = (plan["main_pages"] + plan["rounds"] * plan["swap_pages"]) * plan["page_size"]
    return float(min(plan["concurrency"], tokens / (options.prompt + options.answer)))


def expected(cells: list[Cell], options: argparse.Namespace) -> dict[float, float]:
    """Output tokens/s of pipeline only by latency (ms), from its rate at the lowest."""
    first = min((cell for cell in cells if cell["system"] == PIPELINE_ONLY), key=lambda cell: cell["latency_ms"])
    number, rate, ranks = in_flight(first, options), first["output_tokens_per_s"], len(first["stages"])
    more = {latency: (latency - first["latency_ms"]) / 1e3 for latency in options.latencies}
    return {latency: number / (number / rate + ranks * seconds) for latency, seconds in more.items()}


def rows(cells: list[Cell], options: argparse.Namespace) -> dict[str, dict[float, float]]:
    """Output tokens/s by system and latency."""
    found = {s: {c["latency_ms"]: c["output_tokens_per_s"] for c in cells if c["system"] == s} for s in SYSTEMS}
    return {PIPELINE_ONLY: found[PIPELINE_ONLY], "expected of it": expected(cells, options), PLANNED: found[PLANNED]}


def table(cells: list[Cell], options: argparse.Namespace) -> str:
    """The sweep in Markdown."""
    rates = rows(cells, options)
    lines = ["| output tokens/s | " + " | ".join(f"{latency:g} ms" for latency in options.latencies) + " |"]
    lines.append("| --- " * (1 + len(options.latencies)) + "|")

    def line(name: str, values: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(values) + " |")

    for name, by_latency in rates.items():
        line(name, [f"{by_latency[latency]:,.1f}" for latency in options.latencies])
    pairs = [(rates[PLANNED][latency], rates[PIPELINE_ONLY][latency]) for latency in options.latencies]
    line("planned over pipeline only", [f"{planned / only:.1f}x" for planned, only in pairs])
    line("planned, of its first", [f"{100 * planned / pairs[0][0]:.0f} %" for planned, _ in pairs])
    planned_cells = [cell for cell in cells if cell["system"] == PLANNED]
    line("its rounds x size", [f"{c['plan']['rounds']} x {c['plan']['micro_batch_size']}" for c in planned_cells])
    line("its main, swap pages", [f"{c['plan']['main_pages']}, {c['plan']['swap_pages']}" for c in planned_cells])
    predicted = [c["plan"]["predicted_output_tokens_per_s"] / c["output_tokens_per_s"] - 1 for c in planned_cells]
    line("its prediction", [f"{100 * off:+.0f} %" for off in predicted])
    return "\n".join(lines)


def plot(path: Path, cells: list[Cell], options: argparse.Namespace) -> None:
    """The sweep as lines over latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = {PIPELINE_ONLY: ("#d95f02", "o-"), "expected of it": ("#d95f02", ":"), PLANNED: ("#1b9e77", "o-")}
    for name, by_latency in rows(cells, options).items():
        colour, style = styles[name]
        axes.plot(list(by_latency), list(by_latency.values()), style, color=colour, label=name)
    axes.set_ylim(0)
    axes.set_xticks(options.latencies, [f"{latency:g}" for latency in options.latencies], fontsize=8)
    axes.set_xlabel("one-way latency of every link, ms")
    axes.set_ylabel("output tokens/s")
    axes.set_title(f"{options.model}, {len(cells[0]['stages'])} ranks", fontsize=11)
    axes.legend(frameon=False)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2, help="without torchrun: ranks to launch on this host")
    parser.add_argument(
        "--latencies", type=lambda text: [float(word) for word in text.split(",")], default=LATENCIES_MS
    )
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--kv-gb", type=float, help="cap on the KV memory of a rank, for both systems")
    parser.add_argument("--requests", type=int, default=512, help="at most, in a cell")
    parser.add_argument("--cell-s", type=float, default=60, help="seconds that a cell is to take, about")
    parser.add_argument("--planned", default="", help='overrides of the planned cells only: "kvcache.swap_pages=64"')
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all cells")
    options = parser.parse_intermixed_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        with tempfile.TemporaryDirectory() as logs:  # torchrun's own
            command += [f"--log-dir={logs}", "-m", "bench.latency_sweep", *sys.argv[1:]]
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    cells = work(options)
    if cells:
        text = table(cells, options)
        (options.output / "sweep.md").write_text(text + "\n")
        plot(options.output / "sweep.png", cells, options)
        print(text)


if __name__ == "__main__":
    main()
