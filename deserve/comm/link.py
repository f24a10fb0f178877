"""The contract of a link: frames from one rank to the next, first in, first out.

A frame is a 16-byte header and a payload. Both ends always agree on how many frames are under way (every visit sends
one, an empty one where there is nothing to say), so none is waited for in vain.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from deserve.comm.network import Wire

HEADER_BYTES = 16  # deliver_at (int64, CLOCK_MONOTONIC ns, 0: at once), payload bytes (int64)


class Sender(ABC):
    """The near end of a link."""

    @abstractmethod
    def send(self, payload: torch.Tensor) -> None:
        """Send `payload` (any contiguous tensor); returns at once, the tensor may be reused at once."""

    @abstractmethod
    def close(self) -> None:
        """Wait until all frames have left."""


class Receiver(ABC):
    """The far end of a link. `held_s`: the seconds for which the simulated network held the last frame back."""

    held_s: float = 0.0

    @abstractmethod
    def expect(self) -> None:
        """Post a receive for one more frame. The payload of the last `receive` may be overwritten from now on."""

    @abstractmethod
    def receive(self) -> torch.Tensor:
        """Wait for the next expected frame; its payload as uint8 [bytes], valid until the next `expect`."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more is expected."""


def frame(payload: torch.Tensor, wire: Wire | None, beside: int = 0) -> torch.Tensor:
    """`payload` behind its header, in memory of its own: uint8 [16 + bytes]. The wire carries `beside` bytes more."""
    data = payload.contiguous().view(-1).view(torch.uint8)
    message = torch.empty(HEADER_BYTES + len(data), dtype=torch.uint8)
    message[HEADER_BYTES:] = data
    header = message[:HEADER_BYTES].view(torch.int64)
    header[1] = len(data)
    header[0] = 0 if wire is None else wire.deliver_at(len(message) + beside)
    return message


def unframe(message: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The payload of `message`, and when the simulated network delivers it (CLOCK_MONOTONIC, ns; 0: at once)."""
    deliver_at, nbytes = message[:HEADER_BYTES].view(torch.int64).tolist()
    return message[HEADER_BYTES : HEADER_BYTES + nbytes], deliver_at


def start_thread(name: str, run: Callable[[], None], failed: Callable[[BaseException], object]) -> threading.Thread:
    """A link's thread. Whatever exception ends `run` goes to `failed` at once, and that must end the job.

    To leave it to the main thread is not enough: that may wait for a frame which now never comes.
    """

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            failed(error)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread


class Loopback(Sender, Receiver):
    """A ring of one: what the rank sends is what it receives. There is no network to simulate."""

    def __init__(self) -> None:
        self._frames: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()

    def send(self, payload: torch.Tensor) -> None:
        self._frames.put(payload.contiguous().view(-1).view(torch.uint8).clone())

    def expect(self) -> None:
        """Nothing to post."""

    def receive(self) -> torch.Tensor:
        return self._frames.get()

    def close(self) -> None:
        """All frames have left: they are here."""
