"""Ranks without the seconds of CPU that their imports take: a process that has imported everything forks them.

Reads from standard input what to run, a line of JSON each, and answers with the exit status.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

import_module("deserve.run")  # here, once: ranks that are forked have it


def run_rank(job: dict[str, Any], rank: int) -> NoReturn:
    """Be rank `rank` of `job`, in the process that was forked for it."""
    status = 1
    try:
        for descriptor, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
        os.environ.clear()
        os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = job["command"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(job: dict[str, Any]) -> int:
    """Run `job` to its end. As torchrun does, ask the other ranks to end when one has failed."""
    ranks: set[int] = set()
    for rank in range(job["ranks"]):
        pid = os.fork()
        if not pid:
            run_rank(job, rank)
        ranks.add(pid)
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = status
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return int(bool(failed))


if __name__ == "__main__":
    for line in sys.stdin:
        print(serve(json.loads(line)), flush=True)
