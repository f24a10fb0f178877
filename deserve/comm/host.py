"""What a host is: the one definition by which ranks share memory, a clock, loopback and NCCL."""

import socket
from pathlib import Path
from typing import NamedTuple


class Host(NamedTuple):
    """Processes with the same kernel boot and host name: one CLOCK_MONOTONIC, one memory. NCCL counts hosts alike.

    Containers of one machine have names of their own, and are hosts of their own.
    """

    boot_id: str
    name: str


def this_host() -> Host:
    return Host(Path("/proc/sys/kernel/random/boot_id").read_text().strip(), socket.gethostname())
