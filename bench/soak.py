"""A job of 2,000 requests whose ranks are killed at random moments, and the memory of an undisturbed one.

    python bench/soak.py [--kills 20] [--ranks 3] [--requests 2000] [--seed 0] [--out outputs/soak]
    python bench/soak.py --victims all --ranks 2 --requests 400 --job network.latency_ms=60 sampling.max_tokens=400
    python bench/soak.py --ranks 2 --requests 64 --job model=smollm2-135m model.dtype=float32 sampling.max_tokens=200

1. an undisturbed job: its answers are the truth, and the memory of each of its ranks is sampled;
2. the same job under `torchrun --max-restarts`: again and again a random rank is killed (SIGKILL) a random moment after
   the job has gone on, until `--kills` have died; then the rest runs;
3. every request must have one line of results, with the same text as in the undisturbed job, and no more than 1.1 times
   its tokens may have been sampled.

    sudo python bench/soak.py --minutes 30 --requests 400

disturbs two hosts, played by network namespaces, for so many minutes: one or all ranks are killed, a rank is stopped
(SIGSTOP) for less than comm.timeout_s, the link is cut for 1 to 30 s, or both torchruns get SIGTERM. What has ended is
started again, as by a batch system. Job follows on job; each must answer every request once and as undisturbed. At the
end no process, shared memory or file may be left, and no rank that lived long may have grown.

With `--victims all` every kill takes all ranks at once. `--job` changes the job. `computed` counts what visits compute:
prompts, tokens, draft tokens, and what a start prefills anew.

Prints a Markdown table and writes `soak.json` into `--out`. Exit status 1 if anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from deserve.batch import IntArray, VisitPlan
from deserve.controller import Controller
from deserve.report.progress import Progress
from deserve.report.results import failure
from deserve.run import end
from deserve.run import main as run_rank

COUNTING = "--count-tokens"  # for the ranks, which run this file
STARTUP_S = 120.0  # for the ranks to come up on a busy machine
MOST_SAMPLED = 1.1  # times the tokens of the undisturbed job
TIMEOUT_S = 10  # comm.timeout_s with --minutes
LONGEST_CUT_S = 30.0
SETTLED_S = 2.0  # since the last token: the ranks are past their start
STUCK_S = 240.0  # without a token
NET = "10.79.1"
KINDS = ("kill one", "kill all", "stop", "cut", "terminate")
OWN_FILES = {"results.jsonl", "manifest.json", "metrics.json", "report.html", "survey.json", ".lock", "tokens.txt"}
LONG_LIFE = 40  # samples, one to four a second, of a process whose growth counts
GROWN_FILES = 8  # open ones, of a process in the same time
GROWTH_MB = 16.0  # of a rank between the second quarter of the undisturbed job and its end: more is a leak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--victims", choices=("one", "all"), default="one")
    parser.add_argument("--job", nargs="+", default=[], metavar="key=value")
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
        "output.checkpoint_s=2",
        *options.job,
    ]
    if options.minutes is not None:
        return disturb(options, [*job, f"comm.timeout_s={TIMEOUT_S}", "output.grace_s=5"])
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
    settled = [sample for sample in memory if len(sample) == options.ranks]
    early, late = settled[len(settled) // 4 : len(settled) // 2], settled[-len(settled) // 4 :]
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
        "seconds_to_next_token": spread(killed["seconds"]),
        "of_these_in_the_new_processes": steps(options.out / "soak.log"),
        "computed": counted(options.out / "soak")["computed"],
        "computed_undisturbed": counted(options.out / "calm")["computed"],
        "sampled": counted(options.out / "soak")["sampled"],
        "sampled_undisturbed": counted(options.out / "calm")["sampled"],
        "answers": len(texts),
        "twice": len(repeated),
        "missing": len(expected - texts.keys()),
        "other_text": sum(texts[name] != truth.get(name) for name in texts),
        "rss_mb": [round(max(sample[rank] for sample in late)) for rank in range(options.ranks)],
        "rss_growth_mb": [round(growth[rank], 1) for rank in range(options.ranks)],
        "rss_sampled_s": len(settled),
    }
    (options.out / "soak.json").write_text(json.dumps(figures, indent=2) + "\n")
    print("\n| figure | value |\n| --- | --- |")
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    wrong = [name for name in ("twice", "missing", "other_text", "exit_status") if figures[name]]
    wrong += ["sampled"] if figures["sampled"] > MOST_SAMPLED * figures["sampled_undisturbed"] else []
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
    times: list[float] = []
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
        victims = [chance.randrange(options.ranks)] if options.victims == "one" else list(ranks)
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                ranks[victim].kill()
        killed.append(victims[0])
        times.append(time.time())
        print(f"kill {len(killed)}: {victims} at {line_count(output)} answers", flush=True)
    status = process.wait()
    log = (options.out / "soak.log").read_text(errors="replace")
    return {
        "ranks": killed,
        "seconds": seconds_to_next_token(output, times),
        "status": status,
        "elapsed_s": time.monotonic() - begin,
        "starts": log.count("rank      layers"),
    }


class TwoHostJob:
    """One job on two hosts, started again whenever a torchrun has ended with an error."""

    def __init__(self, hosts: list[str], job: list[str], log: Path, environment: dict[str, str]):
        self._hosts, self._job, self._log, self._environment = hosts, job, log, environment
        self.launches = 0
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.seen: dict[int, psutil.Process] = {}
        self.samples: dict[int, list[tuple[float, int]]] = defaultdict(list)  # MB and open files, by process
        self._launch()

    def _launch(self) -> None:
        self.launches += 1
        self.launchers = []
        for index, host in enumerate(self._hosts):
            meeting = ["--nnodes=2", f"--node-rank={index}", f"--master-addr={NET}.1", "--master-port=29500"]
            launcher = [*meeting, "--nproc-per-node=1", "--max-restarts=9999", "--monitor-interval=0.1"]
            command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *launcher]
            with self._log.open("ab") as file:
                process = subprocess.Popen(
                    [*command, __file__, COUNTING, *self._job],
                    env=self._environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.launchers.append(process)

    def ranks(self) -> list[psutil.Process]:
        """Those that live."""
        found = [rank for launcher in self.launchers for rank in ranks_of(launcher).values()]
        self.seen.update((rank.pid, rank) for rank in found)
        return found

    def sample(self) -> None:
        """Note what ranks and launchers take. Only while tokens come: a start grows by nature."""
        with contextlib.suppress(psutil.Error):
            for process in [*self.ranks(), *(psutil.Process(launcher.pid) for launcher in self.launchers)]:
                self.samples[process.pid].append((process.memory_info().rss / 1e6, process.num_fds()))

    def ended(self) -> bool:
        """Whether all is done. What has failed is ended on the other host too, and started again."""
        statuses = [launcher.poll() for launcher in self.launchers]
        if all(status == 0 for status in statuses):
            return True
        if any(status not in (None, 0) for status in statuses):
            self.end()
            self._launch()
        return False

    def end(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.terminate()
        for launcher in self.launchers:
            try:
                launcher.wait(60)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        psutil.wait_procs(list(self.seen.values()), 60)  # ranks whose torchrun was killed end by themselves

    @property
    def lives(self) -> list[list[tuple[float, int]]]:
        """The samples of the processes that lived long."""
        return [samples for samples in self.samples.values() if len(samples) >= LONG_LIFE]

    def growth(self) -> tuple[float, int]:
        """Of the process that grew most, between the second quarter of its life and the last: MB, and open files."""
        grown = [
            [max(late) - max(early) for early, late in zip(_columns(life, 1), _columns(life, 3), strict=True)]
            for life in self.lives
        ]
        return max((mb for mb, _ in grown), default=0.0), int(max((files for _, files in grown), default=0))


def _columns(life: list[tuple[float, int]], quarter: int) -> Iterator[tuple[float, ...]]:
    return zip(*life[quarter * len(life) // 4 : (quarter + 1) * len(life) // 4], strict=True)


def disturb(options: argparse.Namespace, job: list[str]) -> int:
    """The soak of `--minutes`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what it has started ends with it
    out = options.out.resolve()
    chance = random.Random(options.seed)
    calm = start(2, [*job, f"output.dir={out}/calm"], 0, out / "calm.log").wait()
    truth, _ = read(out / "calm")
    print(f"undisturbed: exit status {calm}, {len(truth)} answers", flush=True)
    scratch = out / "tmp"
    scratch.mkdir()
    # torch asks for the names of addresses, and there is nobody to answer.
    quick = {"RES_OPTIONS": "timeout:1 attempts:1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment = os.environ | quick | {"TMPDIR": str(scratch)}
    shared = set(os.listdir("/dev/shm"))
    wrong: list[str] = []
    kinds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    counts: Counter[str] = Counter()
    launches = jobs = lives = 0
    growth = 0.0, 0
    deadline = time.monotonic() + 60 * options.minutes
    with two_hosts() as hosts:
        while time.monotonic() < deadline:
            output = out / f"job{jobs}"
            running = TwoHostJob(hosts, [*job, f"output.dir={output}"], out / f"job{jobs}.log", environment)
            events: list[tuple[str, float]] = []
            try:
                while not running.ended():
                    ranks = running.ranks()
                    if time.time() - last_token(output) < SETTLED_S:
                        running.sample()
                    quiet = time.time() - max(last_token(output), events[-1][1] if events else 0, output_began(output))
                    if quiet > STUCK_S:
                        wrong.append(f"job {jobs} is stuck after {events[-1:]}")
                        break
                    went_on = len(ranks) == 2 and last_token(output) > (events[-1][1] if events else 0)
                    if went_on and time.monotonic() < deadline:
                        time.sleep(chance.uniform(0, 5))
                        kind = chance.choice(KINDS)
                        apply(kind, chance, hosts, running)
                        events.append((kind, time.time()))
                        print(f"{kind} at {line_count(output)} answers", flush=True)
                    time.sleep(0.25)
            finally:
                running.end()
            counts.update(kind for kind, _ in events)
            for kind, seconds in next_tokens(output, events):
                kinds[kind].append(seconds)
            texts, repeated = read(output)
            expected = {f"fixed-{index}" for index in range(options.requests)}
            checks = {
                "twice": bool(repeated),
                "missing": texts.keys() != expected,
                "other text": any(text != truth.get(name) for name, text in texts.items()),
                f"left in {output}: {set(os.listdir(output)) - OWN_FILES}": bool(set(os.listdir(output)) - OWN_FILES),
                "processes left": any(process.is_running() for process in running.seen.values()),
            }
            wrong += [f"job {jobs}: {name}" for name, found in checks.items() if found]
            growth = max(growth[0], running.growth()[0]), max(growth[1], running.growth()[1])
            done = f"{len(texts)} answers, {len(events)} disturbances, {running.launches} launches"
            print(f"job {jobs}: {done}", flush=True)
            launches, jobs, lives = launches + running.launches, jobs + 1, lives + len(running.lives)
    left = sorted(set(os.listdir("/dev/shm")) - shared)
    own_logs = [name for name in os.listdir(scratch) if name.startswith("torchelastic_")]  # torchrun keeps its logs
    others = sorted(set(os.listdir(scratch)) - set(own_logs))
    wrong += [f"left in /dev/shm: {left}"] if left else []
    wrong += [f"temporary files left: {others}"] if others else []
    wrong += [f"grown by {growth[0]:.1f} MB"] if growth[0] > GROWTH_MB else []
    wrong += [f"{growth[1]} more open files"] if growth[1] > GROWN_FILES else []
    figures: dict[str, Any] = {
        "minutes": options.minutes,
        "jobs": jobs,
        "requests_of_each": options.requests,
        "launches": launches,
        "disturbances": dict(counts),
        "seconds_to_next_token": {kind: spread(seconds) for kind, seconds in kinds.items()},
        "processes_that_lived_long": lives,
        "most_growth_mb": round(growth[0], 1),
        "most_growth_files": growth[1],
        "log_folders_of_torchrun": len(own_logs),
        "wrong": wrong,
    }
    (out / "soak.json").write_text(json.dumps(figures, indent=2) + "\n")
    print("\n| figure | value |\n| --- | --- |")
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    return 1 if wrong else 0


def apply(kind: str, chance: random.Random, hosts: list[str], running: TwoHostJob) -> None:
    """Disturb `running`; returns when the disturbance is over."""
    ranks = running.ranks()
    with contextlib.suppress(psutil.Error, IndexError):
        if kind == "kill one":
            chance.choice(ranks).kill()
        elif kind == "kill all":
            for rank in ranks:
                rank.kill()
        elif kind == "stop":
            victim = chance.choice(ranks)
            victim.suspend()
            time.sleep(chance.uniform(0.5, 0.6 * TIMEOUT_S))
            victim.resume()
        elif kind == "cut":
            subprocess.run(["ip", "-n", hosts[0], "link", "set", "wan", "down"], check=True)
            time.sleep(chance.uniform(1, LONGEST_CUT_S))
            subprocess.run(["ip", "-n", hosts[0], "link", "set", "wan", "up"], check=True)
        else:
            for launcher in running.launchers:
                launcher.terminate()
            for launcher in running.launchers:  # in the grace more tokens come
                launcher.wait()


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces, `NET`.1 and `NET`.2, with a cable between their interfaces `wan`. Needs root."""
    names = [f"soak{os.getpid()}-{index}" for index in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", names[1])
        for index, name in enumerate(names):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"{NET}.{index + 1}/24", "dev", "wan")
            ip("-n", name, "link", "set", "wan", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def output_began(output: Path) -> float:
    """When the job's folder was made; now, as long as there is none."""
    return output.stat().st_ctime if output.exists() else time.time()


def last_token(output: Path) -> float:
    """When the last token was sampled, 0 if none was."""
    notes = notes_of(output) if (output / "tokens.txt").exists() else []
    return next((when for when, kind, count in reversed(notes) if kind == "sampled" and count), 0.0)


def next_tokens(output: Path, events: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The kind of each disturbance, and the seconds from its end to the next token, if one came before the next.

    After a kill a survivor may take in a token that was under way: those of the first second do not count.
    """
    sampled = [when for when, kind, count in notes_of(output) if kind == "sampled" and count]
    found = []
    for kind, ended in events:
        since = ended + (kind in ("kill one", "kill all", "terminate"))
        found += [(kind, when - ended) for when in sampled if when > since][:1]
    return found


def start(ranks: int, overrides: list[str], restarts: int, log: Path) -> subprocess.Popen[bytes]:
    """The job under torchrun, its output in `log`."""
    launcher = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, __file__, COUNTING, *overrides]
    # Idle threads sleep rather than spin: there are more ranks than cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def count_and_run() -> int:
    """A rank that notes in `tokens.txt`, beside the results, when it computes tokens and takes in sampled ones."""
    overrides = sys.argv[sys.argv.index(COUNTING) + 1 :]
    folder = Path(next(word for word in overrides if word.startswith("output.dir=")).partition("=")[2])
    folder.mkdir(parents=True, exist_ok=True)
    notes = (folder / "tokens.txt").open("a", buffering=1)
    plan, take_in = Controller.next_visit, Progress.tokens

    def next_visit(self: Controller, micro_batch: int) -> tuple[VisitPlan, IntArray]:
        visit = plan(self, micro_batch)
        notes.write(f"{time.time()} computed {visit[0].tokens}\n")
        return visit

    def tokens(self: Progress, count: int, *more: int) -> None:
        notes.write(f"{time.time()} sampled {count}\n")
        take_in(self, count, *more)

    Controller.next_visit, Progress.tokens = next_visit, tokens
    sys.argv = ["deserve.run", *overrides]
    return run_rank()


def notes_of(output: Path) -> list[tuple[float, str, int]]:
    """When, what and how many tokens: the whole lines of `tokens.txt`."""
    lines = (output / "tokens.txt").read_text().split("\n")[:-1]
    return [(float(when), kind, int(count)) for when, kind, count in map(str.split, lines)]


def counted(output: Path) -> dict[str, int]:
    """Tokens that all starts of a job computed, and those that they sampled."""
    notes = notes_of(output)
    return {name: sum(count for _, kind, count in notes if kind == name) for name in ("computed", "sampled")}


def seconds_to_next_token(output: Path, kills: list[float]) -> list[float]:
    """From each kill to the first token after it, for those that were followed by one before the next kill.

    A survivor may take in a token that was under way: those of the first second do not count.
    """
    sampled = [when for when, kind, count in notes_of(output) if kind == "sampled" and count]
    found = []
    for kill, after in zip(kills, [*kills[1:], float("inf")], strict=True):
        next_token = min((when for when in sampled if when > kill + 1), default=after)
        if next_token < after:
            found.append(next_token - kill)
    return found


def steps(log: Path) -> dict[str, str]:
    """The seconds of each step of all starts but the first, as rank 0 has said them."""
    starts = re.findall(r"first token .* after the start \((.*)\)", log.read_text(errors="replace"))[1:]
    by_step: dict[str, list[float]] = {}
    for start in starts:
        for step in start.split(", "):
            name, _, seconds = step.rpartition(" ")
            by_step.setdefault(name, []).append(float(seconds))
    return {name: spread(seconds) for name, seconds in by_step.items()}


def spread(seconds: list[float]) -> str:
    """The median and the largest."""
    return f"{statistics.median(seconds):.1f}, at most {max(seconds):.1f}" if seconds else "none"


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
    if COUNTING in sys.argv:
        end(count_and_run())
    sys.exit(main())
