"""The ranks of a job: how they meet, agree and fail together before the first visit."""

import ipaddress
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import psutil
import torch
import torch.distributed as dist

from deserve.comm.gloo import PATIENCE, cause
from deserve.comm.host import Host, this_host
from deserve.comm.pulse import PACE, Pulse, Word
from deserve.errors import LastingError, LinkError, UserError, as_json, tell_torchrun

ARRIVAL_S = 300.0  # for all processes to be there, wherever they were started
MEETING_S = 60.0  # for processes that are there to connect
FAREWELL_S = 10.0  # for the neighbours to say farewell: one that parses a long line answers late
LASTING = "lasting error"  # the note for later starts that the job cannot go on
LAST_WORD_S = 3.0  # for the store to answer: it may be out of reach, or have gone with its torchrun

T = TypeVar("T")


@dataclass(frozen=True)
class Ring:
    """Consecutive ranks that hold the model between them: `size` ranks of the job from `first` on.

    `rank`, counted from there, is this process's place.
    """

    number: int
    first: int
    size: int
    rank: int

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def before(self) -> int:
        """The rank of the job from which this one receives."""
        return self.first + (self.rank - 1) % self.size

    @property
    def after(self) -> int:
        """The rank of the job to which this one sends."""
        return self.first + (self.rank + 1) % self.size


class World:
    """This process's place among the ranks. Small values travel between ranks as JSON, over Gloo.

    torchrun's store is used to meet and to report failures only, so that a job can end in order without torchrun.
    `hosts` has the host of each rank. Without torchrun it is a world of one. A neighbour that is silent for `timeout_s`
    seconds ends this process.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.hosts = [this_host()]
        self._meeting = uuid.uuid4().hex
        self._pulse = None
        self._failing = threading.Lock()
        self._hearing = threading.Lock()
        self._pacing = threading.Lock()
        self.visits: Callable[[], int] = lambda: 0  # that this rank has made
        self.save: Callable[[], None] = lambda: None  # what a failure must not lose
        self.paced: Callable[[int, float], None] = lambda rank, seconds: None  # rank 0's, see `tell_pace`
        self._computed: dict[int, int] = {}  # microseconds by rank, the last that was told
        self._act: Callable[[Word], None] | None = None
        self._missed: list[Word] = []
        self._notice_board: dist.Store = dist.HashStore()
        # With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 the store is rank 0's own and ends with it; the folder of torchrun's
        # logs, RUN/attempt_N/RANK/error.json, stays.
        own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False"
        self._notes = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2] if own_store else None
        self._edges: dict[bool, list[dist.ProcessGroup | None]] = {}
        if self.size > 1:
            try:
                self._meet(max(timeout_s, MEETING_S))
            except RuntimeError as error:
                raise UserError(self._absence(error)) from error
        if self.size > 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # A connection of its own: the other one may be waiting for an answer when something must be said.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._notice_board = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        if self.size > 1:
            names = [f"rank {rank} on {host.name}" for rank, host in enumerate(self.hosts)]
            self._pulse = Pulse(self.rank, names, timeout_s, lambda: self.visits(), self.fail, self._hear)
        here = self.hosts[self.rank]
        self.local_size = self.hosts.count(here)
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.hosts[: self.rank].count(here)))

    def _meet(self, timeout_s: float) -> None:
        """Find the other ranks and connect to all of them."""
        store: dist.Store = next(dist.rendezvous("env://"))[0]
        self._meeting, self.hosts = self._agree(store)
        set_interface(len(set(self.hosts)) > 1)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"{self._meeting}/ring", store),
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

    def _agree(self, store: dist.Store) -> tuple[str, list[Host]]:
        """A name for this meeting that no earlier one had, and the host of each rank.

        torchrun's store outlives the ranks, so what they find there may be left from before a restart: addresses,
        offers. And its count of restarts differs from host to host. So rank 0 offers a new name, each rank answers to
        it with a new word (and its host), and the name holds for those whose word rank 0 has repeated.
        """
        own = [uuid.uuid4().hex, *self.hosts[0]]
        store.set_timeout(timedelta(seconds=ARRIVAL_S))
        if self.rank == 0:
            name = own[0]
            store.set("deserve/offer", name)
            words = [own, *(json.loads(store.get(f"{name}/{rank}")) for rank in range(1, self.size))]
            store.set(f"{name}/met", json.dumps(words))
            return name, [Host(*host) for _, *host in words]
        deadline = time.monotonic() + ARRIVAL_S
        while time.monotonic() < deadline:
            name = store.get("deserve/offer").decode()
            store.set(f"{name}/{self.rank}", json.dumps(own))
            if store.check([f"{name}/met"]):
                words = json.loads(store.get(f"{name}/met"))
                if own in words:
                    return name, [Host(*host) for _, *host in words]
            time.sleep(0.02)
        raise dist.DistStoreError(f"rank 0 has not come within {ARRIVAL_S:g} s")

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def ring(self, rings: int = 1) -> Ring:
        """The ring of this rank, where the ranks form so many. Ranks of one host follow each other: they share one."""
        number, rank = divmod(self.rank, self.size // rings)
        return Ring(number, self.rank - rank, self.size // rings, rank)

    def send(self, rank: int, key: str, value: Any, group: dist.ProcessGroup | None = None) -> None:
        """Send `value` (anything JSON can hold) to `rank`, which receives it under `key`. Raises LinkError.

        In a `group` of its own, messages do not get between those of the start. All of a pair's messages come in order.
        """
        data = torch.frombuffer(bytearray(json.dumps([key, value]).encode()), dtype=torch.uint8)
        try:
            works = [dist.isend(message, rank, group=group) for message in (torch.tensor([len(data)]), data)]
            for work in works:
                assert work is not None
                work.wait(PATIENCE)
        except RuntimeError as error:
            raise LinkError(f"link to rank {rank} is lost: {cause(error)}") from error

    def receive(self, rank: int, key: str, group: dist.ProcessGroup | None = None) -> Any:
        """The next value that `rank` sends, which must be under `key`. Raises LinkError."""
        size = torch.tensor([0])
        try:
            self._fill(size, rank, group)
            data = torch.empty(int(size), dtype=torch.uint8)
            self._fill(data, rank, group)
        except RuntimeError as error:
            raise LinkError(f"link from rank {rank} is lost: {cause(error)}") from error
        found, value = json.loads(data.numpy().tobytes())
        assert found == key, f"rank {rank} sends {found}, rank {self.rank} expects {key}"
        return value

    def _fill(self, tensor: torch.Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
        work = dist.irecv(tensor, rank, group=group)
        assert work is not None
        work.wait(PATIENCE)

    def share(self, key: str, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.rank:
            return self.receive(0, key)
        for rank in range(1, self.size):
            self.send(rank, key, value)
        return value

    def gather(self, key: str, value: Any) -> list[Any]:
        """The `value` of every rank, on rank 0; an empty list on the others."""
        if self.rank:
            self.send(0, key, value)
            return []
        return [value, *(self.receive(rank, key) for rank in range(1, self.size))]

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
                            f"rank {rank} differs from rank 0 in {key}: {as_json(other.get(key))} there, "
                            f"{as_json(facts.get(key))} here; "
                            "start all ranks with the same program, model and overrides"
                        )

    def nccl_edges(self, everywhere: bool) -> list[dist.ProcessGroup | None]:
        """By rank, the NCCL group that the rank shares with the next one. Every rank calls it.

        None for the last rank, and unless `everywhere` between hosts. A group of its own for each: operations of one
        group wait for each other, and in a ring a receive that waits would hold up the send behind it.
        """
        if everywhere not in self._edges:
            near = [everywhere or one == other for one, other in itertools.pairwise(self.hosts)]
            edges = [nccl_group([rank, rank + 1]) if local else None for rank, local in enumerate(near)]
            self._edges[everywhere] = [*edges, None]
        return self._edges[everywhere]

    def heads(self, rings: int) -> dist.ProcessGroup | None:
        """A group of the first ranks of so many rings, whose messages do not get between others; None for one ring.

        Every rank calls it.
        """
        return dist.new_group([*range(0, self.size, self.size // rings)], backend="gloo") if rings > 1 else None

    def leave_note(self, key: str, text: str) -> None:
        """Leave word for later starts of the ranks under the same torchrun, on whichever host it counts them.

        Where torchrun keeps no store for its ranks, for those on this host.
        """
        if self._notes is not None:
            with suppress(OSError):
                (self._notes / quote(key, safe="")).write_text(text)
            return
        self._ask_board(lambda board: board.set(f"deserve/notes/{key}", text))

    def note(self, key: str) -> str | None:
        """What an earlier start left under `key`."""
        if self._notes is not None:
            path = self._notes / quote(key, safe="")
            return path.read_text() if path.exists() else None
        name = f"deserve/notes/{key}"
        return self._notice_board.get(name).decode() if self._notice_board.check([name]) else None

    def on_word(self, act: Callable[[Word], None]) -> None:
        """Have `act` called with each STOP or QUIT of another rank; what was said while nobody listened comes first."""
        with self._hearing:
            self._act = act
            missed, self._missed = self._missed, []
        for word in missed:
            self._hear(word)

    def forget_pace(self) -> None:
        """Begin a job: what ranks have computed counts from its start, and nobody listens yet."""
        with self._pacing:
            self._computed.clear()
            self.paced = lambda rank, seconds: None

    def tell_pace(self, seconds: float) -> None:
        """Tell rank 0 that this rank has computed for `seconds` so far: there `paced` is called, in any thread."""
        self._pass_pace(Word(PACE, self.rank, round(1e6 * seconds)))

    def _pass_pace(self, word: Word) -> None:
        with self._pacing:  # what comes round both ways counts once, and in its order
            if word.cause <= self._computed.get(word.rank, 0):
                return
            self._computed[word.rank] = word.cause
            if self.rank == 0:
                self.paced(word.rank, word.cause / 1e6)
            else:
                self.tell(word)

    def _hear(self, word: Word) -> None:
        if word.kind == PACE:
            self._pass_pace(word)
            return
        with self._hearing:
            act = self._act
            if act is None:
                self._missed.append(word)
        if act is not None:
            act(word)

    def tell(self, word: Word) -> None:
        """Tell the neighbours, which pass it on."""
        if self._pulse is not None:
            self._pulse.tell(word)

    def announce_stop(self) -> None:
        """Leave word, for when torchrun starts the ranks again, that the job was stopped on purpose."""
        if self.rank == 0 or self._notes is not None:
            self.leave_note("stopped", f"{self._meeting} {launchers()}")

    @property
    def stop_announced(self) -> bool:
        """Whether an earlier start of this job was stopped on purpose, and no rank failed in it.

        A stop after which other hosts are there is none: torchrun stops all ranks when a host comes, and one that goes
        stops its own.
        """
        note = self.note("stopped")
        if note is None:
            return False
        meeting, _, hosts = note.partition(" ")
        return hosts == launchers() and not self._notice_board.check([f"{meeting}/failure"])

    def quit(self, message: str, status: int) -> NoReturn:
        """End this process with `status`, before the first visit. All ranks call it; rank 0 says `message`."""
        self._failing.acquire()  # never released: a rank that ends sooner is no failure
        if self.rank == 0:
            print(message, file=sys.stderr, flush=True)
        tell_torchrun(message)
        if self._pulse is not None and not self._pulse.leave(FAREWELL_S):
            self._note_failure(message)  # a neighbour is dead, and the SIGTERM perhaps torchrun's, not a user's
        else:
            self.announce_stop()
        os._exit(status)

    def end_with(self, error: BaseException) -> NoReturn:
        """End this process, and so the job, with what `error` says. Any thread may call it."""
        if isinstance(error, LastingError):
            self.leave_note(LASTING, str(error))
        if isinstance(error, UserError):
            self.fail(str(error))
        if isinstance(error, LinkError):
            self.fail(f"rank {self.rank}: {error}")
        traceback.print_exception(error)
        self.fail(f"rank {self.rank}: {type(error).__name__}: {error}")

    def fail(self, message: str) -> NoReturn:
        """Say what went wrong, once for all ranks, and end this process; the torchrun of every host shows it last.

        At once: links to a rank that is gone cannot be closed tidily, and finished results are on disk.
        """
        self._failing.acquire()  # never released: another thread that fails too must not end the process meanwhile
        with suppress(Exception):  # of which this failure may be the cause
            self.save()
        rank, said = self._note_failure(message)
        if rank == self.rank:
            print(f"deserve: error: {message}", file=sys.stderr, flush=True)
        tell_torchrun(f"deserve: error: {said}")
        os._exit(1)

    def _note_failure(self, message: str) -> tuple[int, str]:
        """The rank that failed first in this meeting, and what it said; this one, if torchrun's store is gone."""
        own = f"{self.rank} {message}"
        first = self._ask_board(lambda board: board.compare_set(f"{self._meeting}/failure", "", own).decode()) or own
        rank, _, said = first.partition(" ")
        return int(rank), said

    def _ask_board(self, question: Callable[[dist.Store], T]) -> T | None:
        """The answer of torchrun's store to `question`, or None if there is none within `LAST_WORD_S`."""
        found: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError):
                found.append(question(self._notice_board))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(LAST_WORD_S)
        return found[0] if found else None

    def say_farewell(self) -> None:
        """Wait until the neighbours have done their part too. The process may end now, and its connections with it."""
        if self._pulse is not None:
            self._pulse.leave()

    def leave(self) -> None:
        """Say farewell and close the connections."""
        self.say_farewell()
        if self.size > 1:
            dist.destroy_process_group()


def launchers() -> str:
    """How many torchruns have started this job's ranks."""
    return os.environ.get("GROUP_WORLD_SIZE", "1")


def nccl_group(ranks: list[int]) -> dist.ProcessGroup:
    """A new NCCL group of `ranks`. Every rank calls it."""
    options = dist.ProcessGroupNCCL.Options()  # of its own: the group notes its name and ranks in it
    options._timeout = PATIENCE
    options.config.max_ctas = 4  # megabytes a visit need no more of the device's processors
    return dist.new_group(ranks, timeout=PATIENCE, backend="nccl", pg_options=options)


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
