"""Host arrays on their way to a device, without ever making the host wait for what the device still computes."""

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(array: NDArray[np.generic] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `array` on `device` (on the CPU: the same memory), enqueued behind the work already there.

    A copy from pageable memory would wait for the device; PyTorch keeps the pinned block it goes through until the
    copy is done, and then uses it again.
    """
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


class StagingRing:
    """Blocks of pinned memory in turn, for copies that others than PyTorch enqueue.

    The host may run as many visits ahead of the device as there are blocks: the copy out of a block stands in the
    stream behind the kernels of the visits before it, and until it is done the block must not be written.
    """

    def __init__(self, sizes: tuple[int, ...], blocks: int = 4):
        """`sizes`: bytes of each buffer of a block."""
        self._buffers = [
            [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes] for _ in range(blocks)
        ]
        # Blocking events: a host that is so far ahead should leave its core to others.
        self._emptied = [torch.cuda.Event(blocking=True) for _ in range(blocks)]
        self._at = 0

    def next(self) -> list[torch.Tensor]:
        """The buffers of the next block, uint8; waits until the copies of its last use are done."""
        self._at = (self._at + 1) % len(self._buffers)
        self._emptied[self._at].synchronize()
        return self._buffers[self._at]

    def enqueued(self) -> None:
        """All copies from the current block are in the current stream."""
        self._emptied[self._at].record()
