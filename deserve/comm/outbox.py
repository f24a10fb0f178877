"""Frames that leave a GPU: sent by a thread as soon as the device has computed them, so that the host never waits."""

import queue
from collections.abc import Callable

import torch

from deserve.comm.link import Sender, start_thread


class Outbox(Sender):
    """Passes what the device computes on to `sender`, a host's.

    The copy to pinned memory stands in the stream behind the kernels that make the payload; the frame's send time
    is when that copy is done. An error in the thread goes to `failed`, which ends the job.
    """

    def __init__(self, sender: Sender, failed: Callable[[BaseException], object]):
        self._sender = sender
        self._device = torch.cuda.current_device()
        self._queue: queue.Queue[tuple[torch.cuda.Event, torch.Tensor] | None] = queue.Queue()
        self._thread = start_thread("outbox", self._run, failed)

    def send(self, payload: torch.Tensor) -> None:
        staged = torch.empty(payload.shape, dtype=payload.dtype, pin_memory=True)
        staged.copy_(payload, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._queue.put((copied, staged))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._sender.close()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)  # of this thread: it would take memory of the first GPU otherwise
        while (entry := self._queue.get()) is not None:
            copied, staged = entry
            copied.synchronize()
            self._sender.send(staged)
