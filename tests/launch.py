"""Starts the project in processes of its own, as a user would."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from deserve.comm.world import World
from deserve.config import load_config
from deserve.run import run

ROOT = Path(__file__).resolve().parent.parent
_surveys: dict[tuple[str, ...], bytes] = {}  # survey.json by the words on which it depends


def torchrun(ranks: int, *arguments: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node=ranks arguments...`, waited for; its output is captured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with shared_survey([*launcher, *arguments]):
        return python(*launcher, *arguments, timeout_s=timeout_s)


def run_jobs(ranks: int, jobs: list[list[str]], folder: Path) -> str:
    """Several jobs, one after the other, in one process group that `job_worker.py` starts; what they print."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = torchrun(ranks, Path(__file__).with_name("job_worker.py"), path)
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
    """`python arguments...` in `cwd`, which imports from the folders `path` first; its output is captured.

    Idle threads sleep rather than spin: the ranks of a test have more threads than a small machine has cores.
    """
    also = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (*map(str, path), *also))),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
