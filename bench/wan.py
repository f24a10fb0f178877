"""Throughput over a real delayed link, beside what the simulated network gives for the same delay.

    sudo .venv/bin/python bench/wan.py --testbed DIR [--models tiny smollm2-135m] [--ranks 2 3] [--delays 0 16 64]
    sudo .venv/bin/python bench/wan.py --testbed DIR --models smollm2-prompts --ranks 2 --delays 30 --mbps 20 \
        [comm.activations=fp8]

`DIR/wan` makes network namespaces that are joined by a relay with a set one-way delay: `wan up -n N --delay-ms D`,
`wan exec I -- COMMAND`, `wan set --delay-ms D --mbps B`, `wan down`; host I has the address 10.77.0.(I+1). Every rank
is a torchrun of its own, on one core (three ranks share two), and a host of its own, by its name. The simulation
differs in delay and bandwidth only: it has the plan of the real run before it, `network.latency_ms` and
`network.bandwidth_mbps`, and goes through the same relay at no delay, as the relay works on the ranks' cores; with
`--loopback` it has no relay. Real and simulated runs alternate; the medians of `--repeat` runs are compared. Prints a
Markdown table and writes `wan.json` into `--out`. Exit status 1 if a run fails or gives other answers than the first
one.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

JOBS = {
    # Visits of many milliseconds for their bytes, beside which the relay's own work on the same cores is small.
    "tiny": [
        "model=tiny",
        "model.architecture.num_hidden_layers=24",
        "pipeline.micro_batch_size=128",
        "workload.source=fixed8000:16:0",
        "sampling.max_tokens=32",
    ],
    "smollm2-135m": ["model=smollm2-135m", "workload.source=fixed640:64:0", "sampling.max_tokens=64"],
    # Most of what crosses the link are prompts, as in classification or extraction.
    "smollm2-prompts": ["model=smollm2-135m", "workload.source=fixed384:192:0", "sampling.max_tokens=32"],
}
COMMON = ["sampling.ignore_eos=true", "output.resume=false"]
MOST_RANKS = {"smollm2-135m": 2, "smollm2-prompts": 2}  # where a rank needs a core of its own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--delays", nargs="+", type=float, default=[0, 16, 64], help="one way, ms")
    parser.add_argument("--mbps", type=float, default=0, help="of each direction of a link; 0: unlimited")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--loopback", action="store_true", help="simulate without namespaces and relay")
    parser.add_argument("--timeout-s", type=float, default=600, help="of one run")
    parser.add_argument("--out", type=Path, default=Path("outputs/wan"))
    parser.add_argument("overrides", nargs="*", help="for all runs, such as model.dtype=bfloat16")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without taking the network down
    rows: list[dict[str, Any]] = []
    truths: dict[str, dict[str, str]] = {}
    for model in options.models:
        for ranks in options.ranks:
            if ranks > MOST_RANKS.get(model, ranks):
                continue
            with testbed(options.testbed, ranks) as wan:
                for delay in options.delays:
                    row = {"model": model, "ranks": ranks, "delay_ms": delay}
                    rows.append(row | compare(options, wan, model, ranks, delay, truths))
                    print(json.dumps(rows[-1]), flush=True)
    figures = {"command": " ".join(sys.argv), "rows": rows}
    (options.out / "wan.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(table(rows))
    return 1 if any(row["other_answers"] for row in rows) else 0


def compare(
    options: argparse.Namespace, wan: Path, model: str, ranks: int, delay: float, truths: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Real and simulated runs of one model, number of ranks and delay."""
    runs: dict[str, list[dict[str, Any]]] = {"real": [], "simulated": []}
    relay: dict[str, list[float]] = {"real": [], "simulated": []}
    other = 0
    for turn in range(options.repeat):
        for kind, found in runs.items():
            folder = options.out / f"{model}-{ranks}x{delay:g}ms-{kind}-{turn}"
            shutil.rmtree(folder, ignore_errors=True)
            job = [*JOBS[model], *COMMON, *options.overrides, f"output.dir={folder}"]
            relayed = [[str(wan), "exec", str(rank), "--"] for rank in range(ranks)]
            set_link(wan, *((delay, options.mbps) if kind == "real" else (0, 0)))
            before = relay_seconds(wan)
            if kind == "real":
                apart = [[*prefix, *named(f"host{rank}")] for rank, prefix in enumerate(relayed)]
                run(job, apart, "10.77.0.1", folder, options.timeout_s)
            else:
                job = [word for word in job if not word.startswith("pipeline.micro_batch_size=")]
                job += [f"network.latency_ms={delay:g}", *layout(runs["real"][-1]["plan"])]
                job += [f"network.bandwidth_mbps={options.mbps:g}"] if options.mbps else []
                if options.loopback:
                    run(job, [[]] * ranks, "127.0.0.1", folder, options.timeout_s)
                else:
                    run(job, relayed, "10.77.0.1", folder, options.timeout_s)
            found.append(json.loads((folder / "metrics.json").read_text()))
            relay[kind].append((relay_seconds(wan) - before) / found[-1]["elapsed_s"])
            texts = answers(folder)
            other += sum(text != truths.setdefault(model, texts).get(name) for name, text in texts.items())
    rates = {kind: [metrics["output_tokens_per_s"] for metrics in found] for kind, found in runs.items()}
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    return {
        "real": round(medians["real"], 1),
        "simulated": round(medians["simulated"], 1),
        "real_runs": [round(rate, 1) for rate in rates["real"]],
        "simulated_runs": [round(rate, 1) for rate in rates["simulated"]],
        "relay_cores": {kind: round(statistics.median(shares), 3) for kind, shares in relay.items()},
        "rounds": [metrics["plan"]["rounds"] for metrics in runs["real"]],
        "partitions": [metrics["plan"]["partition"] for metrics in runs["real"]],
        "predicted_real": round(statistics.median(m["plan"]["predicted_output_tokens_per_s"] for m in runs["real"]), 1),
        "other_answers": other,
    }


def layout(plan: dict[str, Any]) -> list[str]:
    """The overrides that give a run the layers and micro-batches of `plan`."""
    first_layers = ",".join(["emb", *map(str, plan["partition"][1:])])
    return [
        f"pipeline.partition=[{first_layers}]",
        f"pipeline.rounds={plan['rounds']}",
        f"pipeline.micro_batch_size={plan['micro_batch_size']}",
    ]


def run(job: list[str], prefixes: list[list[str]], address: str, folder: Path, timeout_s: float) -> None:
    """One job, a torchrun for each of `prefixes`. Raises RuntimeError, with the end of the logs, if one fails."""
    folder.mkdir(parents=True)
    cores = sorted(os.sched_getaffinity(0))
    # torch asks for the names of addresses, and in the namespaces there is nobody to answer.
    quick = {"RES_OPTIONS": "timeout:1 attempts:1"}
    environment = os.environ | quick | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    meeting = [f"--nnodes={len(prefixes)}", "--nproc-per-node=1", f"--master-addr={address}", "--master-port=29555"]
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for rank, prefix in enumerate(prefixes):
            # Each rank computes on as many threads as it may use cores.
            pin = ["taskset", "-c", str(cores[rank % len(cores)])]
            launch = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--node-rank={rank}"]
            log = stack.enter_context((folder / f"log{rank}").open("wb"))
            command = [*prefix, *pin, *launch, "-m", "deserve.run", *job]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(end, process)
            processes.append(process)
        try:
            statuses = [process.wait(timeout_s) for process in processes]
        except subprocess.TimeoutExpired:
            statuses = [-1]
    if any(statuses):
        logs = "\n".join((folder / f"log{rank}").read_text()[-2000:] for rank in range(len(prefixes)))
        raise RuntimeError(f"{folder} failed: {statuses}\n{logs}")


def end(process: subprocess.Popen[bytes]) -> None:
    """torchrun, which ends its rank."""
    if process.poll() is None:
        process.terminate()
        process.wait()


@contextmanager
def testbed(folder: Path, hosts: int) -> Iterator[Path]:
    """The command of a delayed network that is up for as long as the block lasts."""
    wan = folder.resolve() / "wan"
    subprocess.run([wan, "up", "-n", str(hosts)], check=True, stdout=subprocess.DEVNULL)
    try:
        yield wan
    finally:
        subprocess.run([wan, "down"], check=True, stdout=subprocess.DEVNULL)


def set_link(wan: Path, delay_ms: float, mbps: float) -> None:
    words = ["set", "--delay-ms", f"{delay_ms:g}", "--mbps", f"{mbps:g}"]
    subprocess.run([wan, *words], check=True, stdout=subprocess.DEVNULL)


def named(host: str) -> list[str]:
    """A prefix that runs a command on a host of that name."""
    return ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh"]


def relay_seconds(wan: Path) -> float:
    """Processor seconds that the relay has taken so far."""
    done = subprocess.run([wan, "stat"], check=True, capture_output=True, text=True)
    return float(done.stdout.rsplit("relay_cpu_s_since_up", 1)[1])


def answers(folder: Path) -> dict[str, str]:
    entries = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    last = {entry["custom_id"]: entry for entry in entries}  # of several lines of a request the last one counts
    return {name: entry["response"]["body"]["choices"][0]["text"] for name, entry in last.items()}


def table(rows: list[dict[str, Any]]) -> str:
    names = "model | ranks | one way | real link | simulated | real / simulated | of 0 ms, real | other answers"
    lines = [f"| {names} | cores of the relay, real, simulated |", "| --- " * 9 + "|"]
    for row in rows:
        same = [other for other in rows if (other["model"], other["ranks"]) == (row["model"], row["ranks"])]
        base = min(same, key=lambda other: other["delay_ms"])
        rates = row["real"] / row["simulated"], row["real"] / base["real"]
        lines.append(
            f"| {row['model']} | {row['ranks']} | {row['delay_ms']:g} ms | {row['real']:,.0f} tok/s | "
            f"{row['simulated']:,.0f} tok/s | {rates[0]:.2f} | {rates[1]:.2f} | "
            f"{row['other_answers']} | {row['relay_cores']['real']:.2f}, {row['relay_cores']['simulated']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
