"""How much memory of the host a process may still take, and who else holds memory of a GPU."""

import math
import os
import subprocess
from pathlib import Path

import psutil
import torch

NVIDIA_SMI_S = 10.0  # for an answer: it may wait for a driver that hangs
CONTEXT_BYTES = 1_000_000_000  # CUDA's own, at most, in what this process holds
PROCESS_GROUPS, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes: what the host has available, or less where a batch system or a container limits the process."""
    return int(min(psutil.virtual_memory().available, left_by_control_groups(PROCESS_GROUPS, CONTROL_GROUPS)))


def left_by_control_groups(process_groups: Path, control_groups: Path) -> float:
    """Bytes that the limits of the process' control groups and of all above them leave; infinite without a limit.

    Cached files count as free, since the kernel drops them first. Source: its cgroup-v1/memory.rst and cgroup-v2.rst.
    """
    try:
        lines = process_groups.read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    left = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = control_groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = control_groups / "memory"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parents) - len(root.parents)]):
            left = min(left, _left(folder, *names))
    return left


def _left(folder: Path, limit: str, usage: str, cached: str) -> float:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return math.inf
        statistics = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(most) - int((folder / usage).read_text()) + int(statistics.get(cached, 0)))
    except OSError:  # a container shows its own group as the root
        return math.inf


def held_by_others(device: torch.device) -> str:
    """Which other processes hold how much memory of the GPU `device`, to end a message with; empty if none does.

    nvidia-smi names them. In a container it may see none: then by what neither is free nor this process' own.
    """
    holders = []
    for pid, name, held in _processes_on(device):
        if pid != str(os.getpid()):
            size = f"{int(held) * 2**20 / 1e9:.1f} GB" if held.isdecimal() else "memory"
            holders.append(f"process {pid} ({name}) holds {size} of it")
    if not holders:
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # there is no room for a context
            return ""
        others = total - free - torch.cuda.memory_reserved(device) - CONTEXT_BYTES
        if others > 0:
            holders = [f"other processes hold about {others / 1e9:.1f} of its {total / 1e9:.1f} GB"]
    return "".join(f"; {holder}" for holder in holders)


def _processes_on(device: torch.device) -> list[list[str]]:
    """The process id, name and MiB of each process on the GPU `device`, as nvidia-smi tells them, if it does."""
    # By its UUID: CUDA_VISIBLE_DEVICES numbers GPUs anew.
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", gpu, "--query-compute-apps=pid,used_memory,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line for line in done.stdout.splitlines() if line.count(",") >= 2]
    fields = [[field.strip() for field in line.split(",", 2)] for line in lines]
    return [[pid, name, held] for pid, held, name in fields]
