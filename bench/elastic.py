"""Three hosts, of which one is lost in the middle of the job and comes back: three ranks, two, and three again.

    sudo python bench/elastic.py [--requests 400] [--out outputs/elastic] [--job key=value ...]

Hosts are network namespaces behind a bridge, each with a torchrun for two to three of them. Prints how many ranks each
start had and how long the job stood still, and compares all texts with those of an undisturbed job. Exit status 1 if
they differ.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from soak import COUNTING, line_count, notes_of, ranks_of, read, start

NET = "10.79.2"
SOAK = Path(__file__).with_name("soak.py")
PATIENCE_S = 240.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--job", nargs="+", default=[], metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("outputs/elastic"))
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    job = ["model=tiny", f"workload.source=fixed{options.requests}:24:16", "sampling.max_tokens=100"]
    job += ["sampling.ignore_eos=true", "network.latency_ms=30", "pipeline.rounds=4", "pipeline.micro_batch_size=4"]
    job += ["comm.timeout_s=10", "output.grace_s=0", *options.job]
    assert start(2, [*job, f"output.dir={out}/calm"], 0, out / "calm.log").wait() == 0
    truth, _ = read(out / "calm")
    output = out / "elastic"
    with hosts(3) as names:
        launchers = [launch(index, name, [*job, f"output.dir={output}"], out) for index, name in enumerate(names)]
        try:
            await_plans(out / "log0", 3)  # the first start may have two, if the third host is late
            await_tokens(launchers, output, time.time(), options.requests // 8)
            victim = [launchers[2].pid, *(rank.pid for rank in ranks_of(launchers[2]).values())]
            subprocess.run(["ip", "-n", names[2], "link", "set", "wan", "down"], check=True)
            lost = time.time()
            for pid in victim:
                os.kill(pid, 9)
            launchers[2].wait()
            await_tokens(launchers, output, lost + 1, line_count(output) + options.requests // 8)
            subprocess.run(["ip", "-n", names[2], "link", "set", "wan", "up"], check=True)
            back = time.time()
            launchers[2] = launch(2, names[2], [*job, f"output.dir={output}"], out)
            await_plans(out / "log0", 3)
            statuses = [launcher.wait(PATIENCE_S * 2) for launcher in launchers]
        finally:
            for launcher in launchers:
                if launcher.poll() is None:
                    launcher.terminate()
                    launcher.wait()
    texts, repeated = read(output)
    sampled = [when for when, kind, count in notes_of(output) if kind == "sampled" and count]
    plans = plans_of(out / "log0")
    figures = {
        "exit_statuses": statuses,
        "ranks_of_each_start": plans,
        "seconds_from_loss_to_next_token": round(min(when for when in sampled if when > lost + 1) - lost, 1),
        "seconds_from_return_to_next_token_of_three": round(gap_after(sampled, back), 1),
        "answers": len(texts),
        "twice": len(repeated),
        "other_text": sum(texts[name] != truth[name] for name in texts),
        "missing": len(truth.keys() - texts.keys()),
        "resumed_tokens": json.loads((output / "metrics.json").read_text())["resumed_tokens"],
    }
    print(json.dumps(figures, indent=2))
    wrong = any(statuses) or plans[-3:] != [3, 2, 3]
    return int(wrong or any(figures[name] for name in ("twice", "other_text", "missing")))


def launch(index: int, host: str, job: list[str], out: Path) -> subprocess.Popen[bytes]:
    """The torchrun of a host, as bench/slurm/elastic.sbatch starts it."""
    address = f"{NET}.1" if index == 0 else f"~host{index}"
    launcher = ["--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=99", "--monitor-interval=0.1"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint={NET}.1:29500", f"--local-addr={address}"]
    launcher += [f"--rdzv-conf=is_host={str(index == 0).lower()},last_call_timeout=5"]
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *launcher]
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "RES_OPTIONS": "timeout:1 attempts:1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    with (out / f"log{index}").open("ab") as file:
        return subprocess.Popen(
            [*command, str(SOAK), COUNTING, *job], env=environment, stdout=file, stderr=subprocess.STDOUT
        )


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Network namespaces, `NET`.1 and so on, whose interfaces `wan` lead to a bridge. Needs root."""
    names = [f"elastic{os.getpid()}-{index}" for index in range(count)]
    switch = f"elastic{os.getpid()}-switch"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "name", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for index, name in enumerate(names):
            ip("netns", "add", name)
            port = f"port{index}"
            ip("-n", name, "link", "add", "wan", "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "switch", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"{NET}.{index + 1}/24", "dev", "wan")
            ip("-n", name, "link", "set", "wan", "up")
        yield names
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "del", name], check=False)


def await_tokens(launchers: list[subprocess.Popen[bytes]], output: Path, since: float, lines: int) -> None:
    """Wait for a token after `since` and for so many lines of results."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        notes = notes_of(output) if (output / "tokens.txt").exists() else []
        if line_count(output) >= lines and any(when > since for when, kind, count in notes if count):
            return
        assert time.monotonic() < deadline and launchers[0].poll() is None, "the ring does not go on"
        time.sleep(0.2)


def await_plans(log: Path, ranks: int) -> None:
    """Wait for the last start to have so many `ranks`."""
    deadline = time.monotonic() + PATIENCE_S
    while plans_of(log)[-1:] != [ranks]:
        assert time.monotonic() < deadline, f"never {ranks} ranks"
        time.sleep(0.2)


def plans_of(log: Path) -> list[int]:
    """The ranks of each start, by the plans that rank 0 has printed."""
    tables = log.read_text(errors="replace").split("rank      layers")[1:]
    found = (re.match(r"[^\n]*\n((?:\d+ +\d+ +\d+ +[\d.]+ *\n)*)", table) for table in tables)
    return [rows.group(1).count("\n") for rows in found if rows]


def gap_after(sampled: list[float], moment: float) -> float:
    """From the last token before the longest gap after `moment` to the token that ends it (s)."""
    after = sorted(when for when in sampled if when > moment)
    return max(later - earlier for earlier, later in pairwise(after))


if __name__ == "__main__":
    sys.exit(main())
