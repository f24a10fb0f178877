"""Starts the project in processes of its own, as a user would."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torchrun(ranks: int, *arguments: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node=ranks arguments...`, waited for; its output is captured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return python(*launcher, *arguments, timeout_s=timeout_s)


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
