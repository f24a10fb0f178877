"""The program: `torchrun --nproc-per-node=N -m deserve.run [overrides]`. Compose, meet, plan, load, run, report."""

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from deserve import __version__
from deserve.comm.network import require_far_links, require_one_host
from deserve.comm.ring import connect
from deserve.comm.world import LASTING, World
from deserve.config import Config, as_dict, load_config
from deserve.dispatch.client import Client
from deserve.dispatch.dispatcher import asking
from deserve.errors import UserError, tell_torchrun
from deserve.head import Head, RingPlan
from deserve.job import Job
from deserve.memory import held_by_others
from deserve.model.checkpoint import Checkpoint, check_files, model_dtype, resolve
from deserve.model.config import DTYPES
from deserve.model.tokenizer import load_tokenizer
from deserve.pipeline import run_pipeline
from deserve.planner.survey import keep_pace, survey
from deserve.report.clock import shifted, to_rank_0s_clock
from deserve.report.metrics import stage_metrics
from deserve.report.startup import Startup
from deserve.stage import load_stage
from deserve.stop import SIGNALS, STOPPED, Stop, stopped_line
from deserve.timeline import Timeline
from deserve.workload import check_source

HELP = """\
Answers a file of requests with a language model, in pipeline stages on one or more ranks.

  deserve workload.source=in.jsonl output.dir=out                   one rank
  torchrun --nproc-per-node=2 -m deserve.run workload.source=...    two ranks

  workload.source=FILE        a request per line, such as {"prompt": "Once upon a time", "max_tokens": 50}
  output.dir=DIR              results.jsonl, report.html and metrics.json; the same command resumes a job
  model.path=DIR_OR_HUB_ID    the model; without it SmolLM2-135M
  sampling.max_tokens=256     tokens of an answer, for requests that do not say
  network.latency_ms=64       simulate a slow link between the ranks
"""


SPEAKING_S = 10.0  # that rank 0 has to find the same mistake as the others


def run(config: Config, world: World, startup: Startup | None = None) -> int:
    """One job, from the composed configuration to `metrics.json`. Every rank calls it. Returns the exit status.

    `startup` has the steps that came before.
    """
    with Stop(world, config.output.grace_s, seconds_left(config, world)) as stop:
        return run_until(stop, config, world, startup or Startup())


def run_until(stop: Stop, config: Config, world: World, startup: Startup) -> int:
    """The job of `run`, ended early by `stop`."""
    with world.step("device"):
        require_one_host(config.network, world.hosts)
        require_far_links(config, world.hosts)
        device = set_up_device(config, world)
    with world.step("model"):
        checkpoint = resolve(config.model)
        check_files(checkpoint)
        dtype = model_dtype(config.model, checkpoint.config, device.type == "cpu")
    world.require_same({"the kind of device": device.type, **facts(config, checkpoint)})
    # Rank 0's choice: with model.dtype=auto it depends on the CPU, and hosts may have several kinds.
    dtype = DTYPES[world.share("dtype", str(dtype).removeprefix("torch."))]
    job = None
    with world.step("workload"):
        if world.rank == 0:
            # Once begun, a job goes on when torchrun starts the ranks again, with output.resume=false too.
            begun = f"begun/{config.output.dir}"
            before = world.note(begun)
            if before is not None:
                require_results(config, before, world)
            job = Job(config, checkpoint, resume=config.output.resume or before is not None)
            world.leave_note(begun, world.hosts[0].name)
    startup.done("workload")
    kept = Path(config.output.dir) / "survey.json"
    machine = survey(world, config, checkpoint, dtype, device, kept)
    startup.done("survey")
    chosen = None
    with host_awaited(config, world), world.step("plan"):
        if job is not None and machine is not None:
            chosen = [asdict(plan) for plan in job.plan(machine, dtype)]
    startup.done("plan")
    plans = TypeAdapter(list[RingPlan]).validate_python(world.share("plan", chosen))
    ring = world.ring(len(plans))
    layout = plans[ring.number].layout
    with world.step("load"):
        stage = load_stage(checkpoint, layout, layout.shard(ring.rank, checkpoint.config.num_layers), dtype, device)
        if job is not None:
            job.load_draft_model(layout, dtype, device)
    startup.done("loading", capture=stage.capture_s)
    links = connect(world, config, layout, checkpoint.config.hidden_size, dtype, device, ring)
    heads = world.heads(len(plans))
    timeline = Timeline(config.trace, device)
    clock = to_rank_0s_clock(world) if config.trace else 0
    controller = head = None
    world.visits = lambda: timeline.counts["compute"]
    world.forget_pace()
    timeline.report = world.tell_pace
    startup.done("links")
    with world.step("ready"):
        if job is not None and links.tokens_in is not None:
            controller = job.controller(plans, links.tokens_in, stop, timeline, startup, world, heads)
            head = job.head
            if len(plans) == 1:  # a slow ring gets fewer requests; a straggler in one of several is not named
                names = [f"rank {rank} on {host.name}" for rank, host in enumerate(world.hosts)]
                pace = job.pace(layout, names, partial(keep_pace, kept))
                controller.planned, world.paced = pace.planned, pace.report
            stop.begin_visits()
        elif links.tokens_in is not None:
            plan = plans[ring.number]
            client = Client(asking(world, heads), plan.most_requests, world.end_with)
            head = Head(config, checkpoint, load_tokenizer(checkpoint), plan, None, client)
            controller = head.controller(links.tokens_in, client, client, stop, timeline)
        if controller is not None:
            controller.ahead = ring.size == 1 and device.type == "cuda"
            world.save = controller.save_now
    run_pipeline(stage, links, controller, layout.rounds, checkpoint.config.hidden_size, timeline)
    if job is not None:
        job.close()
    world.save = lambda: None
    # A stop that came after the last answer has stopped nothing.
    stopped_by = world.share("stopped", None if job is not None and job.whole else stop.reason)
    stages = world.gather("stages", stage_metrics(timeline, stage))
    reports = world.gather("heads", None if head is None else head.report())
    spans = world.gather("spans", shifted(timeline.spans, clock)) if config.trace else []
    if job is not None:
        try:
            job.report([report for report in reports if report is not None], stages, spans, stopped_by)
        except OSError as error:
            raise UserError(
                f"the results are whole, but {error.filename} cannot be written: {error.strerror}"
            ) from error
    if stopped_by is None:
        return 0
    world.announce_stop()
    if world.rank == 0:
        print(stopped_line(stopped_by), file=sys.stderr, flush=True)
    tell_torchrun(stopped_line(stopped_by))
    return STOPPED


def require_results(config: Config, before: str, world: World) -> None:
    """Raises UserError if rank 0 was on the host `before`, and the results are not on its present one."""
    here = world.hosts[0].name
    if here != before and not (Path(config.output.dir) / "manifest.json").exists():
        raise UserError(
            f"rank 0 was on {before} and is on {here} now, where output.dir={config.output.dir} has no results of this "
            "job: put output.dir on a file system that both share, or give the host of rank 0 the --local-addr that "
            "sorts first"
        )


@contextmanager
def host_awaited(config: Config, world: World) -> Iterator[None]:
    """If the ranks that are left cannot hold what more of them held, wait `elastic.wait_s` for a host to come back.

    torchrun starts all ranks anew when it does. Every rank calls it; the UserError is raised when the time is over.
    """
    planned, waits = f"planned/{config.output.dir}", f"waits/{config.output.dir}"
    try:
        yield
    except UserError as error:
        message = None
        if world.rank == 0 and int(world.note(planned) or 0) > world.size:
            since = float(world.note(waits) or time.time())
            world.leave_note(waits, str(since))
            left = f"{world.size} ranks are left" if world.size > 1 else "one rank is left"
            wait = f"elastic.wait_s={config.elastic.wait_s:g}"
            print(f"deserve: {left}: {error}. Waiting for a host ({wait})", file=sys.stderr, flush=True)
            time.sleep(max(0.0, since + config.elastic.wait_s - time.time()))
            message = f"{left}, and no host came back within {wait}: {error}"
        message = world.share("waited", message)
        raise error if message is None else UserError(message) from error
    if world.rank == 0:
        world.leave_note(planned, str(world.size))
        world.leave_note(waits, "")


def seconds_left(config: Config, world: World) -> float | None:
    """What is left of `time_limit_s`, which counts from the first start of the ranks under one torchrun."""
    if config.time_limit_s is None or world.rank > 0:
        return None  # rank 0 watches it
    key = f"began/{config.output.dir}"
    began = float(world.note(key) or time.time())
    world.leave_note(key, str(began))
    return began + config.time_limit_s - time.time()


def facts(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """What all ranks must have in common. A model's folder may differ, and be named otherwise; its files may not."""
    sections = as_dict(config)
    settings = {
        f"{name}.{key}" if isinstance(section, dict) else name: value
        for name, section in sections.items()
        for key, value in (section.items() if isinstance(section, dict) else [("", section)])
    }
    del settings["model.path"], settings["model.name"], settings["speculation.model"]
    return {"the version of deserve": __version__, "the model's files": checkpoint.fingerprint(), **settings}


def set_up_device(config: Config, world: World) -> torch.device:
    """The device of this rank; on CPU the ranks of a host share its cores evenly."""
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise UserError("device=cuda, but PyTorch finds no GPU: device=cpu runs without one")
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {world.rank} is number {world.local_rank} on its host, which has {torch.cuda.device_count()} "
                "GPUs: start no more ranks than GPUs (--nproc-per-node)"
            )
        device = torch.device("cuda", world.local_rank)
        try:
            torch.cuda.set_device(device)
            torch.cuda.mem_get_info(device)  # needs a context, for which there may be no room
        except RuntimeError as error:
            raise UserError(
                f"rank {world.rank} cannot use GPU {device.index} of its host: {str(error).splitlines()[0]}"
                f"{held_by_others(device)}. CUDA_VISIBLE_DEVICES names others"
            ) from error
        # For the host's part: locking the memory of swap pages is slow on one core.
        torch.set_num_threads(max(1, min(8, len(psutil.Process().cpu_affinity() or [0]) // world.local_size)))
        return device
    if config.comm.backend == "nccl":
        raise UserError("comm.backend=nccl is for GPUs, and this run is on CPUs: leave it at auto")
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's own default, not a choice of the user's
        cores = len(psutil.Process().cpu_affinity() or [0])
        torch.set_num_threads(max(1, cores // world.local_size))
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Let glibc keep what tensors give back: returning it to the kernel at every layer costs more than the layer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 32 << 20)  # the most it takes


def main() -> int:
    """Exit status: 0 done, 1 the job failed, 2 a wrong configuration or input file, 75 stopped early and resumable."""
    parser = argparse.ArgumentParser(
        prog="deserve", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="store_true", help="print all keys with their values and exit")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as those above")
    arguments = parser.parse_args()
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(arguments.overrides)
        if speaks and not arguments.config:
            check_source(config)
    except UserError as error:
        return complain(error, speaks, 2)
    if arguments.config:
        print(OmegaConf.to_yaml(as_dict(config)), end="")
        return 0
    startup = Startup(psutil.Process().create_time())
    startup.done("imports")
    try:
        world = World(config.comm.timeout_s)
    except UserError as error:
        return complain(error, True, 1)
    if world.stop_announced:
        world.leave()  # threads that still listen at exit would abort the process
        return STOPPED
    lasting = world.note(LASTING)
    if lasting is not None:
        world.fail(lasting)
    try:
        startup.done("rendezvous")
        status = run(config, world, startup)
    except Exception as error:
        world.end_with(error)
    for number in SIGNALS:  # those that torchrun sends when another rank has ended with 75
        signal.signal(number, signal.SIG_IGN)
    world.say_farewell()  # no more: a rank that is killed from here on keeps its host waiting, see `end`
    return status


def complain(error: UserError, speaks: bool, status: int) -> int:
    """One message for all ranks: those that do not speak let rank 0 do so before torchrun ends it for their sake."""
    tell_torchrun(f"deserve: error: {error}")
    if speaks:
        print(f"deserve: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(SPEAKING_S)  # torchrun ends this rank when rank 0 has ended
    return status


def end(status: int) -> NoReturn:
    """End the process, without what Python does at its end, which takes half a second.

    Once the ranks of another host have ended, torchrun cannot start one again: a rank killed in that half second would
    keep its host waiting for minutes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end(main())
