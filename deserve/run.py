"""The program: `torchrun --nproc-per-node=N -m deserve.run [overrides]`. Compose, meet, plan, load, run, report."""

import argparse
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf

from deserve import __version__
from deserve.comm.network import require_far_links, require_one_host
from deserve.comm.ring import connect
from deserve.comm.world import LASTING, World
from deserve.config import Config, as_dict, load_config
from deserve.errors import UserError, tell_torchrun
from deserve.job import Job
from deserve.layout import Layout
from deserve.memory import held_by_others
from deserve.model.checkpoint import Checkpoint, check_files, model_dtype, resolve
from deserve.pipeline import run_pipeline
from deserve.planner.survey import survey
from deserve.report.clock import shifted, to_rank_0s_clock
from deserve.report.metrics import stage_metrics
from deserve.stage import load_stage
from deserve.stop import SIGNALS, STOPPED, Stop, stopped_line
from deserve.timeline import Timeline


def run(config: Config, world: World) -> int:
    """One job, from the composed configuration to `metrics.json`. Every rank calls it. Returns the exit status."""
    with Stop(world, config.output.grace_s, seconds_left(config, world)) as stop:
        return run_until(stop, config, world)


def run_until(stop: Stop, config: Config, world: World) -> int:
    """The job of `run`, ended early by `stop`."""
    with world.step("device"):
        require_one_host(config.network, world.hosts)
        require_far_links(config, world.hosts)
        device = set_up_device(config, world)
    with world.step("model"):
        checkpoint = resolve(config.model)
        check_files(checkpoint)
        dtype = model_dtype(config.model, checkpoint.config)
    world.require_same({"the kind of device": device.type, **facts(config, checkpoint)})
    job = None
    with world.step("workload"):
        if world.rank == 0:
            # Once begun, a job goes on when torchrun starts the ranks again, with output.resume=false too.
            begun = f"begun/{config.output.dir}"
            job = Job(config, checkpoint, resume=config.output.resume or world.note(begun) is not None)
            world.leave_note(begun, "")
    kept = Path(config.output.dir) / "survey.json"
    machine = survey(world, config, checkpoint, dtype, device, kept)
    chosen = None
    with world.step("plan"):
        if job is not None and machine is not None:
            chosen = job.plan(machine, dtype).to_json()
    layout = Layout.from_json(world.share("plan", chosen))
    with world.step("load"):
        stage = load_stage(checkpoint, layout, layout.shard(world.rank, checkpoint.config.num_layers), dtype, device)
    links = connect(world, config, layout, checkpoint.config.hidden_size, dtype, device)
    timeline = Timeline(config.trace, device)
    clock = to_rank_0s_clock(world) if config.trace else 0
    controller = None
    with world.step("ready"):
        if job is not None and links.tokens_in is not None:
            controller = job.controller(layout, links.tokens_in, stop, timeline)
            stop.begin_visits()
    run_pipeline(stage, links, controller, layout.rounds, checkpoint.config.hidden_size, timeline)
    # A stop that came after the last answer has stopped nothing.
    stopped_by = world.share("stopped", None if job is not None and job.whole else stop.reason)
    stages = world.gather("stages", stage_metrics(timeline, stage))
    spans = world.gather("spans", shifted(timeline.spans, clock)) if config.trace else []
    if job is not None:
        try:
            job.report(layout, stages, spans, stopped_by)
        except OSError as error:
            raise UserError(
                f"the results are whole, but {error.filename} cannot be written: {error.strerror}"
            ) from error
    if stopped_by is None:
        return 0
    if world.rank == 0:
        world.announce_stop()
        print(stopped_line(stopped_by), file=sys.stderr, flush=True)
    tell_torchrun(stopped_line(stopped_by))
    return STOPPED


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
    del settings["model.path"], settings["model.name"]
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
    """Exit status: 0 done, 1 the job failed, 2 a mistake in the configuration, 75 stopped early and resumable."""
    parser = argparse.ArgumentParser(prog="deserve.run", description=__doc__)
    parser.add_argument("--config", action="store_true", help="print the composed configuration and exit")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model=tiny or pipeline.rounds=4")
    arguments = parser.parse_args()
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(arguments.overrides)
    except UserError as error:
        return complain(error, speaks, 2)
    if arguments.config:
        print(OmegaConf.to_yaml(as_dict(config)), end="")
        return 0
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
        status = run(config, world)
    except Exception as error:
        world.end_with(error)
    for number in SIGNALS:  # those that torchrun sends when another rank has ended with 75
        signal.signal(number, signal.SIG_IGN)
    world.leave()
    return status


def complain(error: UserError, speaks: bool, status: int) -> int:
    """One message for all ranks."""
    tell_torchrun(f"deserve: error: {error}")
    if speaks:
        print(f"deserve: error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
