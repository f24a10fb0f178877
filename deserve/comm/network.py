"""The simulated network: when a message that leaves now would arrive over a slow link."""

import threading
import time
from collections.abc import Sequence

from deserve.comm.host import Host
from deserve.config import Config, NetworkSection
from deserve.errors import UserError


class Wire:
    """One direction of a link with a one-way latency and, if stated, a bandwidth.

    Messages queue for the bandwidth and overlap in the latency, as on a real link: each occupies the wire for its
    bytes, then takes `latency_ms`. Sender and receiver share a host, so CLOCK_MONOTONIC is their common clock.
    """

    def __init__(self, latency_ms: float, bandwidth_mbps: float | None):
        self._latency_ns = round(latency_ms * 1e6)
        self._ns_per_byte = 0.0 if bandwidth_mbps is None else 8e3 / bandwidth_mbps
        self._free_at = 0
        self._lock = threading.Lock()  # plans and hidden states leave a rank by threads of their own

    def deliver_at(self, nbytes: int) -> int:
        """The CLOCK_MONOTONIC time (ns) at which a message of `nbytes` that is sent now has arrived."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic_ns()) + round(nbytes * self._ns_per_byte)
            return self._free_at + self._latency_ns


def hold_until(deadline_ns: int) -> float:
    """Sleep until CLOCK_MONOTONIC reaches `deadline_ns`; returns the seconds slept."""
    remaining = (deadline_ns - time.monotonic_ns()) / 1e9
    if remaining > 0:
        time.sleep(remaining)
        return remaining
    return 0.0


def is_simulated(network: NetworkSection) -> bool:
    return network.latency_ms > 0 or network.bandwidth_mbps is not None


def far_links(network: NetworkSection, hosts: Sequence[Host]) -> list[bool]:
    """By rank, whether its link to the next one joins two hosts; a simulated network stands for such links."""
    after = [*hosts[1:], hosts[0]]
    return [len(hosts) > 1 and (is_simulated(network) or a != b) for a, b in zip(hosts, after, strict=True)]


def require_far_links(config: Config, hosts: Sequence[Host]) -> None:
    """Raises UserError where hidden states are to be coded between hosts and none go from one host to another."""
    if config.comm.activations != "auto" and not any(far_links(config.network, hosts)[:-1]):
        ranks = "this run has one rank" if len(hosts) == 1 else f"all {len(hosts)} ranks are on {hosts[0].name}"
        raise UserError(
            f"comm.activations={config.comm.activations} codes hidden states between hosts, and {ranks}: leave it at "
            "auto, or simulate a network by network.latency_ms or network.bandwidth_mbps"
        )


def require_one_host(network: NetworkSection, hosts: Sequence[Host]) -> None:
    """Raises UserError for a simulated network between hosts: `deliver_at` is a time by the sender's clock."""
    found = dict.fromkeys(hosts)
    if is_simulated(network) and len(found) > 1:
        raise UserError(
            "network.latency_ms and network.bandwidth_mbps simulate a network between ranks of one host, by its clock; "
            f"these ranks are on {len(found)} hosts ({', '.join(host.name for host in found)}): leave both unset"
        )
