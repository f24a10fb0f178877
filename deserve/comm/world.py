"""The ranks of a job: how they meet, agree and fail together before the first visit."""

import ipaddress
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from deserve.comm.pulse import Pulse
from deserve.errors import UserError

ARRIVAL_S = 300.0  # for all processes to be there, wherever they were started
MEETING_S = 60.0  # for processes that are there to connect
PIECE_BYTES = 4 << 20  # the store takes no value of more than 8 MiB, and a long trace is larger
LAST_WORD_S = 3.0  # for the store to say whether somebody else has reported the failure
NO_TIMEOUT = timedelta(days=365)  # it is the pulse that notices a dead rank
START_TIMEOUT = timedelta(hours=2)  # a large checkpoint over a slow disk; a rank that dies ends the others at once


class World:
    """This process's place among the ranks. Small things are exchanged as JSON through the store that torchrun keeps.

    `local_size` counts the ranks on this host. Without torchrun it is a world of one. A neighbour that is silent for
    `timeout_s` seconds ends this process.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._meeting = ""
        self._store: dist.Store = dist.HashStore()
        if self.size > 1:
            try:
                self._meet(max(timeout_s, MEETING_S))
            except RuntimeError as error:
                raise UserError(self._absence(error)) from error
        self._store.set_timeout(START_TIMEOUT)
        self._pulse = None
        self._failing = threading.Lock()
        self._notice_board: dist.Store = dist.HashStore()
        if self.size > 1:
            # A connection of its own: the other one may be waiting for an answer when something must be said.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._notice_board = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
            self._pulse = Pulse(self.rank, self.size, timeout_s, self.fail)
        self._edges: dict[bool, list[dist.ProcessGroup | None]] = {}
        self._jobs = 0
        self._names: dist.Store = self._store

    def _meet(self, timeout_s: float) -> None:
        """Find the other ranks and connect to all of them."""
        set_interface(self.size > self.local_size)
        store: dist.Store = next(dist.rendezvous("env://"))[0]
        self._meeting = self._agree_on_name(store)
        store = dist.PrefixStore(self._meeting, store)
        self._store = dist.PrefixStore("deserve", store)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("ring", store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout_s),
        )

    def _absence(self, error: RuntimeError) -> str:
        return (
            f"rank {self.rank} cannot reach the others (MASTER_ADDR={os.environ['MASTER_ADDR']}, "
            f"MASTER_PORT={os.environ['MASTER_PORT']}, "
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')}): {str(error).splitlines()[0]}"
        )

    def _agree_on_name(self, store: dist.Store) -> str:
        """A name for this meeting that no earlier one had.

        torchrun's store outlives the ranks, so what they find there may be left from before a restart: addresses,
        plans, offers. And its count of restarts differs from host to host. So rank 0 offers a new name, each rank
        answers to it with a new word, and the name holds for those whose word rank 0 has repeated.
        """
        own = uuid.uuid4().hex
        store.set_timeout(timedelta(seconds=ARRIVAL_S))
        if self.rank == 0:
            store.set("deserve/offer", own)
            words = [store.get(f"{own}/{rank}").decode() for rank in range(1, self.size)]
            store.set(f"{own}/met", json.dumps(words))
            return own
        deadline = time.monotonic() + ARRIVAL_S
        while time.monotonic() < deadline:
            name = store.get("deserve/offer").decode()
            store.set(f"{name}/{self.rank}", own)
            if store.check([f"{name}/met"]) and own in json.loads(store.get(f"{name}/met")):
                return name
            time.sleep(0.02)
        raise dist.DistStoreError(f"rank 0 has not come within {ARRIVAL_S:g} s")

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def begin_job(self) -> None:
        """Every job of this process names what it exchanges anew. All ranks call it."""
        self._names = dist.PrefixStore(f"job{self._jobs}", self._store)
        self._jobs += 1

    def publish(self, key: str, value: Any) -> None:
        """Make `value` (anything JSON can hold) readable by all ranks under `key`."""
        text = json.dumps(value)
        pieces = [text[begin : begin + PIECE_BYTES] for begin in range(0, len(text), PIECE_BYTES)]
        for index, piece in enumerate(pieces):
            self._names.set(f"{key}/piece{index}", piece)
        self._names.set(key, str(len(pieces)))  # last: whoever waits for `key` finds all of them

    def read(self, key: str) -> Any:
        """What some rank publishes under `key`; waits until it has."""
        count = int(self._names.get(key))
        return json.loads(b"".join(self._names.get(f"{key}/piece{index}") for index in range(count)))

    def share(self, key: str, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.rank == 0:
            self.publish(key, value)
            return value
        return self.read(key)

    def gather(self, key: str, value: Any) -> list[Any]:
        """The `value` of every rank, on rank 0; an empty list on the others."""
        self.publish(f"{key}/{self.rank}", value)
        if self.rank:
            return []
        return [self.read(f"{key}/{rank}") for rank in range(self.size)]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A part of the start that all ranks finish, or none: a UserError on one rank is raised on every rank."""
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        messages = self.gather(f"step/{name}", message)
        failed = [f"rank {rank}: {text}" if rank else text for rank, text in enumerate(messages) if text]
        verdict = self.share(f"verdict/{name}", failed[0] if failed else None)
        if verdict is not None:
            raise UserError(verdict)

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raises UserError on all ranks, naming rank and key, unless they agree in all of `facts`."""
        everyone = self.gather("facts", facts)
        with self.step("facts"):
            for rank, other in enumerate(everyone):
                for key in sorted(facts.keys() | other.keys()):
                    if facts.get(key) != other.get(key):
                        raise UserError(
                            f"rank {rank} differs from rank 0 in {key}: {other.get(key)!r} there, "
                            f"{facts.get(key)!r} here; start all ranks with the same program, model and overrides"
                        )

    def nccl_edges(self, everywhere: bool) -> list[dist.ProcessGroup | None]:
        """By rank, the NCCL group that the rank shares with the next one. Every rank calls it.

        None for the last rank, and unless `everywhere` between hosts. A group of its own for each: operations of one
        group wait for each other, and in a ring a receive that waits would hold up the send behind it.
        """
        if everywhere not in self._edges:
            hosts = self.share("hosts", self.gather("hosts", os.environ.get("GROUP_RANK")))
            near = [everywhere or hosts[rank] == hosts[rank + 1] for rank in range(self.size - 1)]
            edges = [nccl_group([rank, rank + 1]) if local else None for rank, local in enumerate(near)]
            self._edges[everywhere] = [*edges, None]
        return self._edges[everywhere]

    def announce_stop(self) -> None:
        """Leave word, for when torchrun starts the ranks again, that the job was stopped on purpose."""
        # Not under the name of this meeting: it is for the next.
        self._notice_board.set("deserve/stopped", "")

    @property
    def stop_announced(self) -> bool:
        """Whether an earlier start of this job was stopped on purpose."""
        return self._notice_board.check(["deserve/stopped"])

    def fail(self, message: str) -> NoReturn:
        """Say what went wrong, once for all ranks, and end this process.

        At once: links to a rank that is gone cannot be closed tidily, and finished results are on disk.
        """
        self._failing.acquire()  # never released: another thread that fails too must not end the process meanwhile
        found: list[bool] = []
        thread = threading.Thread(target=self._is_first, args=(found,), daemon=True)
        thread.start()
        thread.join(LAST_WORD_S)
        first = all(found)  # also when there is no answer: the store is out of reach, or went down with its host
        if first:
            print(f"deserve: error: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    def _is_first(self, found: list[bool]) -> None:
        with suppress(RuntimeError):
            found.append(self._notice_board.add(f"{self._meeting}/failures", 1) == 1)

    def leave(self) -> None:
        """Close the connections."""
        if self._pulse is not None:
            self._pulse.leave()
        if self.size > 1:
            dist.destroy_process_group()


def nccl_group(ranks: list[int]) -> dist.ProcessGroup:
    """A new NCCL group of `ranks`. Every rank calls it."""
    options = dist.ProcessGroupNCCL.Options()  # of its own: the group notes its name and ranks in it
    options._timeout = NO_TIMEOUT
    options.config.max_ctas = 4  # megabytes a visit need no more of the device's processors
    return dist.new_group(ranks, timeout=NO_TIMEOUT, backend="nccl", pg_options=options)


def set_interface(several_hosts: bool) -> None:
    """Have Gloo use the network interface that leads to MASTER_ADDR, unless GLOO_SOCKET_IFNAME says which.

    Its own choice is the interface of the address that the host's name stands for: often 127.0.1.1, or another network.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing, but chooses the way
            own = probe.getsockname()[0]
    except OSError:
        return  # not to be reached, as will be said
    names = [name for name, found in psutil.net_if_addrs().items() if own in [entry.address for entry in found]]
    # On the host of MASTER_ADDR its name may stand for loopback, which the other hosts cannot reach.
    if names and not (several_hosts and ipaddress.ip_address(own).is_loopback):
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]
