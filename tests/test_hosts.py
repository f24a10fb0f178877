"""Several hosts, played by network namespaces with a cable between them, and a torchrun in each."""

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from background import Running, answers, line_count, running, torchrun_command, wait_until
from launch import run_here

NET = "10.79.0"
COUNT, IN_FLIGHT = 64, 8
JOB = ["model=tiny", f"workload.source=fixed{COUNT}:24:12", "sampling.max_tokens=48", "sampling.ignore_eos=true"]


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, `NET`.1 and `NET`.2, each with an interface `wan`."""
    names = [f"deserve{os.getpid()}-{index}" for index in range(2)]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("cannot make network namespaces")
        if not ip("-n", names[0], "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", names[1]):
            pytest.skip("cannot make veth devices")
        for index, name in enumerate(names):
            assert ip("-n", name, "link", "set", "lo", "up")
            assert ip("-n", name, "addr", "add", f"{NET}.{index + 1}/24", "dev", "wan")
            assert ip("-n", name, "link", "set", "wan", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def start(hosts: list[str], tmp_path: Path) -> Iterator[Callable[..., list[Running]]]:
    """Starts a job with one rank on each host."""
    with ExitStack() as stack:

        def begin(*overrides: str, restarts: int = 0) -> list[Running]:
            output = tmp_path / "out"
            jobs = []
            for index, name in enumerate(hosts):
                launcher = ["--nnodes=2", f"--node-rank={index}", f"--master-addr={NET}.1", "--master-port=29500"]
                command = torchrun_command(1, *overrides, f"output.dir={output}", launcher=launcher, restarts=restarts)
                command = ["ip", "netns", "exec", name, *command]
                # torch asks for the names of addresses, and there is nobody to answer
                environment = {"RES_OPTIONS": "timeout:1 attempts:1"}
                jobs.append(stack.enter_context(running(command, output, tmp_path / f"log{index}", environment)))
            return jobs

        yield begin


def test_same_answers_as_on_one_host_after_an_interruption_a_restart_and_a_cut(
    start: Callable[..., list[Running]], hosts: list[str], tmp_path: Path
) -> None:
    """The link is down for less than comm.timeout_s: the job waits, and goes on where it was. Then a rank is killed,
    and torchrun starts both again. Then the link is cut, which both sides notice; and one host does the rest.
    """
    output, timeout_s = tmp_path / "out", 8
    assert run_here(*JOB, f"output.dir={tmp_path / 'single'}") == 0
    # A slow network, small micro-batches and no drafts, so that the job lasts some seconds
    slow = ["network.latency_ms=10", "pipeline.rounds=2", f"pipeline.micro_batch_size={IN_FLIGHT // 2}"]
    jobs = start(*JOB, *slow, "speculation.tokens=0", f"comm.timeout_s={timeout_s}", restarts=1)
    jobs[0].until_answers(COUNT // 8)
    ranks = [jobs[0].rank(0), jobs[1].rank(1)]
    assert ip("-n", hosts[0], "link", "set", "wan", "down")
    while_down = line_count(output)
    threading.Event().wait(2)
    assert line_count(output) <= while_down + IN_FLIGHT
    assert ip("-n", hosts[0], "link", "set", "wan", "up")
    jobs[0].until_answers(while_down + IN_FLIGHT + 1)
    assert [jobs[0].rank(0), jobs[1].rank(1)] == ranks and not jobs[0].errors + jobs[1].errors
    ranks[1].kill()
    for index, job in enumerate(jobs):
        job.until(lambda job=job, index=index: job.has_rank(index, ranks[index]))
    before = [len(job.errors) for job in jobs]
    jobs[0].until_answers(line_count(output) + 1)
    assert ip("-n", hosts[0], "link", "set", "wan", "down")
    for index, job in enumerate(jobs):
        job.until(lambda job=job, index=index: len(job.errors) > before[index])
        (message,) = job.errors[before[index] :]
        assert f"rank {1 - index} on {socket.gethostname()} has been silent for {timeout_s} s" in message
        assert f"noticed by rank {index} on link {1 - index} -> {index}" in message
        # Not its torchrun, which waits for its own connection to the other for up to a minute.
        wait_until(lambda job=job, index=index: not job.has_rank(index), 10, lambda job=job: job.log)
    found = answers(output)
    assert len(found) < COUNT
    assert run_here(*JOB, f"output.dir={output}") == 0
    assert len(answers(output)) == COUNT and answers(output) == answers(tmp_path / "single")
