"""Ranks that die, hang, are told to stop or do not fit together: noticed, said once, and nothing answered is lost."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from background import answers, free_port, line_count, running, torchrun_command, unfinished, wait_until
from checkpoints import make_checkpoint
from launch import ROOT, run_here, shared_survey

from deserve.config import load_config
from deserve.errors import UserError
from deserve.model.checkpoint import resolve
from deserve.run import facts

COUNT = 96
# Requests of different lengths; a slow network and no drafts, so that the job lasts four seconds on any machine.
JOB = ["model=tiny", f"workload.source=fixed{COUNT}:24:12", "sampling.max_tokens=48", "sampling.ignore_eos=true"]
SLOW = ["network.latency_ms=5", "pipeline.rounds=2", "pipeline.micro_batch_size=6", "speculation.tokens=0"]
RUN = [sys.executable, "-m", "deserve.run"]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The answers of an undisturbed run."""
    output = tmp_path_factory.mktemp("undisturbed")
    assert run_here(*JOB, f"output.dir={output}") == 0
    found = answers(output)
    assert len(found) == COUNT and len(set(found.values())) > COUNT // 2
    return found


def resume(output: Path, truth: dict[str, str]) -> None:
    """Finish the job of `output`, on one rank, and compare."""
    before = answers(output)
    assert before.items() <= truth.items()
    assert run_here(*JOB, f"output.dir={output}") == 0
    assert answers(output) == truth


def test_a_killed_rank_is_started_again(tmp_path: Path, truth: dict[str, str]) -> None:
    output = tmp_path / "out"
    # Results of an earlier job are set aside once, not at the restart.
    more = [f"output.dir={output}", "output.resume=false", "output.checkpoint_s=0.01"]
    command = torchrun_command(2, *JOB, *SLOW, *more, restarts=2)
    with running(command, output, tmp_path / "log") as job:
        job.until_answers(COUNT // 8)
        # All that are in flight end at about the same time: the next ones have just begun.
        job.kill_when(0, lambda: bool(unfinished(output) - answers(output).keys()))
        assert job.wait() == 0, job.log[-3000:]
        # The other rank says so, unless torchrun, which looks every 100 ms here, was quicker to end it.
        assert len(job.errors) <= 1
        for message in job.errors:
            assert "rank 0" in message and ("has closed its connection" in message or "is lost" in message)
        assert "Traceback" not in job.log
    assert answers(output) == truth
    assert not list(output.glob("results.jsonl.*")) and not (output / "unfinished.jsonl").exists()
    assert json.loads((output / "metrics.json").read_text())["resumed_tokens"] > 0


def test_a_hanging_rank_is_noticed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    endless = [*JOB, *SLOW, "workload.source=fixed100000:24:12", f"output.dir={output}", "comm.timeout_s=5"]
    with running(torchrun_command(2, *endless), output, tmp_path / "log") as job:
        job.until_answers(COUNT // 2)  # beats have told of visits by then: each answer takes 48 trips of 10 ms
        hanging = job.rank(1)
        hanging.suspend()
        job.until(lambda: bool(job.errors))
        hanging.resume()  # torchrun waits for it to take the SIGTERM
        assert job.wait() == 1
        (message,) = job.errors
        assert (
            f"rank 1 on {socket.gethostname()} has been silent for 5 s" in message
            and " last heard of after its visit " in message
        )
    answers(output)


def test_the_death_of_torchrun_stops_the_job_in_time_and_it_resumes(tmp_path: Path, truth: dict[str, str]) -> None:
    """With its store. A signal to a rank is for test_mixture.py."""
    output = tmp_path / "out"
    command = torchrun_command(2, *JOB, *SLOW, f"output.dir={output}", "output.grace_s=5")
    with running(command, output, tmp_path / "log") as job:
        job.until_answers(COUNT // 8)
        ranks = [job.rank(0), job.rank(1)]
        job.process.kill()
        wait_until(lambda: not any(rank.is_running() for rank in ranks), 30, lambda: job.log)
        assert not job.errors and "Traceback" not in job.log
        stopped_by = json.loads((output / "metrics.json").read_text())["stopped_by"]
        assert stopped_by.startswith("the death of torchrun, rank ")
    assert line_count(output) < COUNT
    resume(output, truth)


def test_a_time_limit_stops_for_good(tmp_path: Path) -> None:
    """Before the first visit at once. torchrun takes the status for a failure and starts the ranks anew: they leave."""
    output = tmp_path / "out"
    limited = [*JOB, "time_limit_s=0.001", f"output.dir={output}"]
    with running(torchrun_command(2, *limited, restarts=1), output, tmp_path / "log") as job:
        assert job.wait() != 0
        assert not job.errors and f"exitcode  : {75}" in job.log and "predicted" not in job.log
        said = [line for line in job.log.splitlines() if line.startswith("deserve:")]
        assert said == ["deserve: stopped by time_limit_s; the same command resumes it, unfinished answers too"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output\.dir.*Not a directory"):
        run_here(*JOB, f"output.dir={tmp_path}/file/out")


def test_figures_that_cannot_be_written(tmp_path: Path, truth: dict[str, str]) -> None:
    (tmp_path / "metrics.tmp").mkdir()
    with pytest.raises(UserError, match=r"^the results are whole, but .* Is a directory"):
        run_here(*JOB, f"output.dir={tmp_path}")
    assert answers(tmp_path) == truth


def test_a_file_that_may_not_grow(tmp_path: Path, truth: dict[str, str]) -> None:
    """A quota, as it were: the line that does not fit is taken back."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    output = tmp_path / "out"
    command = [*RUN, *JOB, f"output.dir={output}"]
    pipes: dict[str, Any] = {"capture_output": True, "text": True}
    with shared_survey(command):
        done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, timeout=90, check=False, **pipes)
    messages = [line for line in done.stderr.splitlines() if line.startswith("deserve: error:")]
    assert done.returncode == 1 and len(messages) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "results.jsonl cannot be written: File too large" in messages[0]
    assert 15_000 < (output / "results.jsonl").stat().st_size <= 20_000
    resume(output, truth)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, truth: dict[str, str]) -> None:
    output = small_disk / "out"
    with running([*RUN, *JOB, f"output.dir={output}"], output, tmp_path / "log") as job:
        assert job.wait() == 1
        (message,) = job.errors
        assert "results.jsonl cannot be written: No space left on device" in message
    assert 0 < len(answers(output)) < COUNT
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    resume(output, truth)


def test_a_disk_that_may_only_be_read(small_disk: Path) -> None:
    """At the start, and for the resume of a job."""
    output = small_disk / "out"
    assert run_here("model=tiny", "workload.source=fixed2:4:0", "sampling.max_tokens=2", f"output.dir={output}") == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in (output, small_disk / "new"):
        with pytest.raises(UserError, match=r"^output\.dir=.* cannot be written: .*Read-only file system"):
            run_here("model=tiny", "workload.source=fixed2:4:0", "sampling.max_tokens=2", f"output.dir={folder}")


def start_by_hand(tmp_path: Path, *overrides: list[str]) -> str:
    """Start one rank with each list of overrides, as a launcher of one's own would; what they say when they refuse."""
    port = str(free_port())
    commands = [[*RUN, *own, f"output.dir={tmp_path / 'out'}"] for own in overrides]
    world = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with (
        running(commands[0], tmp_path, tmp_path / "log0", world | {"RANK": "0"}) as first,
        running(commands[1], tmp_path, tmp_path / "log1", world | {"RANK": "1"}) as second,
    ):
        assert (first.wait(), second.wait()) == (1, 1), first.log + second.log
        return "\n".join([*first.errors, *second.errors])


def test_ranks_with_different_overrides_are_refused(tmp_path: Path) -> None:
    message = start_by_hand(tmp_path, [*JOB, "sampling.seed=1"], [*JOB, "sampling.seed=2"])
    assert "rank 1 differs from rank 0 in sampling.seed: 2 there, 1 here" in message
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_ranks_with_different_models_are_told_apart(tmp_path: Path) -> None:
    """Same shapes, other weights: as of a model and its fine-tuned brother."""
    config = load_config(JOB)
    found = []
    for seed in range(2):
        folder = make_checkpoint(tmp_path / f"model{seed}", seed=seed)
        found.append(facts(config, resolve(load_config([f"model.path={folder}"]).model)))
    one, other = found
    assert {key for key in one | other if one[key] != other[key]} == {"the model's files"}
