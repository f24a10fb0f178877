"""Links over NCCL: what one GPU computes goes to the next without passing through host memory.

A pending NCCL send or receive is a kernel that spins on the device and takes processors from the visit that runs
there. So neither is posted before the payload has been computed: the sender then posts its half and sends a notice over
Gloo, upon which the receiver, at once, posts the other. For the same reason the simulated network holds back the notice
and not the payload, which waits in the receiver's memory.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from deserve.comm.gloo import GlooReceiver, GlooSender
from deserve.comm.link import Receiver, Sender, start_thread
from deserve.comm.network import hold_until
from deserve.errors import LinkError

WARM_UP_BYTES = 1 << 20
ALIGNED_BYTES = 256


class NcclSender(Sender):
    """Sends what the device computes to the other rank of `group`. `notices` go to the same rank.

    An error in its thread goes to `failed`, which ends the job.
    """

    def __init__(
        self,
        peer: int,
        group: dist.ProcessGroup,
        notices: GlooSender,
        device: torch.device,
        failed: Callable[[BaseException], object],
    ):
        self._peer, self._group, self._notices, self._device = peer, group, notices, device
        self._stream = torch.cuda.Stream(device)
        self._queue: queue.SimpleQueue[tuple[torch.cuda.Event, torch.Tensor] | None] = queue.SimpleQueue()
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._post(torch.zeros(WARM_UP_BYTES, dtype=torch.uint8, device=device))  # connects the two
        self._thread = start_thread("nccl sender", self._run, failed)

    def send(self, payload: torch.Tensor) -> None:
        """The caller leaves `payload` as it is from now on."""
        computed = torch.cuda.Event(blocking=True)
        computed.record()
        self._queue.put((computed, payload))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._notices.close()
        self._under_way.clear()  # the last frames, of micro-batches that retire, are empty: all others have arrived

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (entry := self._queue.get()) is not None:
            computed, payload = entry
            computed.synchronize()
            payload = payload.view(-1).view(torch.uint8)
            with named(f"link to rank {self._peer}"):
                if len(payload):
                    self._post(payload)
                self._notices.send(torch.tensor([len(payload)]), beside=len(payload))

    def _post(self, payload: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            work = dist.isend(payload, self._peer, group=self._group)
        assert work is not None
        self._under_way.append((work, payload))
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()


class _Arrival(NamedTuple):
    payload: torch.Tensor
    received: torch.cuda.Event
    deliver_at: int


class NcclReceiver(Receiver):
    """Receives at most `max_bytes` a frame from the other rank of `group`, into as many buffers as frames may come
    before the first of them has been used.

    `ahead` frames are expected from the start, and no more than these are ever under way at once. An error in its
    thread goes to `failed`, which ends the job.
    """

    def __init__(
        self,
        peer: int,
        group: dist.ProcessGroup,
        notices: GlooReceiver,
        max_bytes: int,
        ahead: int,
        device: torch.device,
        failed: Callable[[BaseException], object],
    ):
        self._peer, self._group, self._notices, self._device = peer, group, notices, device
        self._stream = torch.cuda.Stream(device)
        # In one piece, since PyTorch rounds up what it allocates; kernels want their vectors aligned.
        size = -(-max_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
        self._buffers = deque(torch.empty(ahead + 1, size, dtype=torch.uint8, device=device).unbind())
        self._expected: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._post(torch.empty(WARM_UP_BYTES, dtype=torch.uint8, device=device)).synchronize()
        for _ in range(ahead):
            self._expected.put(True)  # the notices of these have been posted by who made `notices`
        start_thread("nccl receiver", self._run, failed)

    def expect(self) -> None:
        self._notices.expect()
        self._expected.put(True)

    def receive(self) -> torch.Tensor:
        arrival = self._arrived.get()
        self.held_s = hold_until(arrival.deliver_at) if arrival.deliver_at else 0.0
        torch.cuda.current_stream(self._device).wait_event(arrival.received)
        return arrival.payload

    def close(self) -> None:
        self._expected.put(False)

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while self._expected.get():
            with named(f"link from rank {self._peer}"):
                notice, deliver_at = self._notices.take()
                buffer = self._buffers[0]
                self._buffers.rotate(-1)
                payload = buffer[: int(notice.view(torch.int64))]
                received = self._post(payload) if len(payload) else torch.cuda.Event()
            self._arrived.put(_Arrival(payload, received, deliver_at))

    def _post(self, payload: torch.Tensor) -> torch.cuda.Event:
        """Receive into `payload`; the event has passed when it is there."""
        received = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            work = dist.irecv(payload, self._peer, group=self._group)
            assert work is not None
            work.wait()  # the stream's wait, not the host's
            received.record()
        return received


@contextmanager
def named(link: str) -> Iterator[None]:
    """What NCCL or the device reports in the body becomes a LinkError that names `link`."""
    try:
        yield
    except RuntimeError as error:
        raise LinkError(f"{link} is lost: {error}") from error
