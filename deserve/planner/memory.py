"""How much memory of the host a process may still take."""

import math
from pathlib import Path

import psutil

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
