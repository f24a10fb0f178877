"""Starts the project in processes of its own: by torchrun as a user would, or sooner by a fork server."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch.distributed as dist

from deserve.comm.world import World
from deserve.config import load_config
from deserve.run import run

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
_surveys: dict[tuple[str, ...], bytes] = {}  # survey.json by the words on which it depends


def torchrun(ranks: int, *arguments: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node=ranks arguments...`, waited for; its output is captured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with shared_survey([*launcher, *arguments]):
        return python(*launcher, *arguments, timeout_s=timeout_s)


def run_ranks(
    ranks: int, script: str, *arguments: str | Path, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """`tests/script arguments...` in `ranks` processes, waited for; their output is captured.

    They meet as under torchrun. But neither it nor they import anything, which takes longer than most jobs.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment = passive() | meeting | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        for path in (out, err):
            path.touch()
        job = {"ranks": ranks, "command": [str(TESTS / script), *map(str, arguments)], "environment": environment}
        server = fork_server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job | {"stdout": str(out), "stderr": str(err)}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout_s)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            fork_server.cache_clear()
            raise subprocess.TimeoutExpired(job["command"], timeout_s, out.read_text(), err.read_text())
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(job["command"], status, out.read_text(), err.read_text())


@cache
def fork_server() -> subprocess.Popen[str]:
    """The fork server of this process, with which it ends; it is in a process group with its ranks."""
    command = [sys.executable, str(TESTS / "fork_server.py")]
    pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=passive(), text=True, start_new_session=True, **pipes)


def run_jobs(ranks: int, jobs: list[list[str]], folder: Path) -> str:
    """Several jobs, one after the other, in one process group that `job_worker.py` starts; what they print."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    (first,) = [word for word in jobs[0] if word.startswith("output.dir=")]
    with shared_survey([f"--nproc-per-node={ranks}", first]):  # of which `job_worker.py` does not ask what it is of
        done = run_ranks(ranks, "job_worker.py", path)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_here(*overrides: str) -> int:
    """A job of one rank in this process, which has imported everything already; its exit status. Raises UserError."""
    with shared_survey(overrides):
        return run(load_config(list(overrides)), World())


@contextmanager
def shared_survey(command: Sequence[str | Path]) -> Iterator[None]:
    """Lend the job of `command` the survey of an earlier one with as many ranks, the same model and the same pages.

    The program checks by itself whether it fits.
    """
    words = [str(word) for word in command]
    outputs = [Path(word.removeprefix("output.dir=")) for word in words if word.startswith("output.dir=")]
    if not outputs:
        yield
        return
    names = ("--nproc-per-node", "model", "kvcache.page_size", "pipeline.max_batch_tokens")
    key = tuple(word for word in words if word.startswith(names))
    kept = outputs[-1] / "survey.json"
    if key in _surveys and not kept.exists():
        with suppress(OSError):  # of which the job is to complain
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(_surveys[key])
    yield
    if kept.exists():
        _surveys[key] = kept.read_bytes()


def python(
    *arguments: str | Path, timeout_s: float = 300, cwd: Path = ROOT, path: Sequence[Path] = (ROOT,)
) -> subprocess.CompletedProcess[str]:
    """`python arguments...` in `cwd`, which imports from the folders `path` first; its output is captured."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=passive(path), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def passive(path: Sequence[Path] = (ROOT,)) -> dict[str, str]:
    """The environment of a process that imports from the folders `path` first.

    Idle threads sleep rather than spin: the ranks of a test have more threads than a small machine has cores.
    """
    also = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    imports = {"PYTHONPATH": os.pathsep.join(filter(None, (*map(str, path), *also)))}
    return os.environ | imports | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
