"""Links over Gloo: CPU tensors over TCP."""

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from deserve.comm.link import HEADER_BYTES, Receiver, Sender, frame, unframe
from deserve.comm.network import Wire, hold_until
from deserve.errors import LinkError

PATIENCE = timedelta(days=365)  # a frame may take as long as a visit does; it is the pulse that notices a dead rank


class GlooSender(Sender):
    """Sends frames to `peer`, at most `depth` of them unfinished."""

    def __init__(
        self,
        peer: int,
        tag: int,
        depth: int,
        wire: Wire | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self._peer, self._tag, self._depth, self._wire, self._group = peer, tag, depth, wire, group
        self._unfinished: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, payload: torch.Tensor, beside: int = 0) -> None:
        """`beside`: bytes that travel by another way, but share the simulated wire with this frame."""
        message = frame(payload, self._wire, beside)
        try:
            work = dist.isend(message, self._peer, group=self._group, tag=self._tag)
        except RuntimeError as error:
            raise LinkError(f"link to rank {self._peer} is lost: {cause(error)}") from error
        assert work is not None
        self._unfinished.append((work, message))
        # A frame this old was received long ago: its micro-batch has come round since. The wait only frees memory.
        self._settle(self._depth)

    def close(self) -> None:
        self._settle(0)

    def _settle(self, most: int) -> None:
        """Wait until at most `most` frames are unfinished."""
        while len(self._unfinished) > most:
            try:
                self._unfinished.popleft()[0].wait(PATIENCE)
            except RuntimeError as error:
                raise LinkError(f"link to rank {self._peer} is lost: {cause(error)}") from error


class GlooReceiver(Receiver):
    """Receives frames of at most `max_bytes` from `peer`; `ahead` of them are expected from the start.

    Gloo sends data only after the notice that a receive is posted has crossed the link, so a late receive costs
    up to two more latencies: a receive is posted for every frame as soon as it is known that it will come.
    """

    def __init__(
        self,
        peer: int,
        tag: int,
        max_bytes: int,
        ahead: int = 0,
        group: dist.ProcessGroup | None = None,
        pinned: bool = False,
    ):
        """`pinned`: the frames are meant for a GPU, whose copies need not pass through further memory then."""
        self._peer, self._tag, self._group, self._pinned = peer, tag, group, pinned
        self._size = HEADER_BYTES + max_bytes
        self._posted: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._spare: list[torch.Tensor] = []
        self._taken: torch.Tensor | None = None  # the buffer of the last frame
        for _ in range(ahead):
            self.expect()

    def expect(self) -> None:
        buffer = (
            self._spare.pop() if self._spare else torch.empty(self._size, dtype=torch.uint8, pin_memory=self._pinned)
        )
        work = dist.irecv(buffer, self._peer, group=self._group, tag=self._tag)
        assert work is not None
        self._posted.append((work, buffer))

    def receive(self) -> torch.Tensor:
        payload, deliver_at = self.take()
        self.held_s = hold_until(deliver_at) if deliver_at else 0.0
        return payload

    def close(self) -> None:
        """Nothing to stop: a receive is posted for expected frames only, and all of them have come."""

    def take(self) -> tuple[torch.Tensor, int]:
        """The next frame's payload, and when the simulated network delivers it (CLOCK_MONOTONIC, ns; 0: at once).

        The payload is valid until the next call.
        """
        work, buffer = self._posted.popleft()
        if self._taken is not None:  # whoever expects further frames may be another thread
            self._spare.append(self._taken)
        self._taken = buffer
        try:
            work.wait(PATIENCE)
        except RuntimeError as error:
            raise LinkError(f"link from rank {self._peer} is lost: {cause(error)}") from error
        return unframe(buffer)


def cause(error: RuntimeError) -> str:
    """Gloo's message without source file and advice, such as "Connection closed by peer [10.0.0.2]:29500"."""
    return str(error).split("] ", 1)[-1].split(". ")[0]
