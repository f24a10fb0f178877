"""The workload, read ahead of the visits."""

import queue
import threading
from collections.abc import Callable, Iterable

from deserve.batch import Completion, Request
from deserve.workload.item import Answered, Item, Rejected
from deserve.workload.sampling import choices


class ReadAhead:
    """Reads the workload ahead in a thread, so that parsing and tokenizing never hold up a visit.

    Items already answered are passed over (`skipped` counts them, `read` all), rejected ones go to `record`. So do
    completions, which `continued` gives for requests whose answers earlier starts have kept. An error in the thread is
    raised by `poll`.
    """

    def __init__(
        self,
        items: Iterable[Item],
        done: set[str],
        continued: Callable[[Request], Request | Completion],
        record: Callable[[Rejected | Completion], None],
        ahead: int,
        until: Callable[[], bool] | None = None,
    ):
        """Up to `ahead` requests are kept ready. With `until`, `poll` waits for the next request or until that is true,
        so what it gives does not depend on how fast the workload is read.
        """
        self._items, self._done, self._continued, self._record = items, done, continued, record
        self._until = until
        self._queue: queue.Queue[Request] = queue.Queue(maxsize=ahead)
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self.read = self.skipped = 0
        self._thread = threading.Thread(target=self._read, name="read ahead", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for item in self._items:
                self.read += 1
                if isinstance(item, Answered) or item.custom_id in self._done:
                    self.skipped += 1
                elif isinstance(item, Rejected):
                    self._record(item)
                else:
                    for request in map(self._continued, choices(item)):
                        if isinstance(request, Completion):
                            self._record(request)
                        else:
                            self._queue.put(request)
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def poll(self) -> Request | None:
        if self._until is not None:
            self.wait(1, self._until)
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            if self._ended.is_set() and self._error is not None:
                raise self._error from None
            return None

    @property
    def ready(self) -> int:
        """Requests that are kept ready."""
        return self._queue.qsize()

    @property
    def exhausted(self) -> bool:
        # In this order: what was put before the end is in the queue by then.
        return self._ended.is_set() and self._queue.empty() and self._error is None

    def wait(self, count: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until `count` requests (or as many as fit) are ready, all are read, or the job is `stopped`."""
        while not (self._ended.is_set() or self._queue.qsize() >= min(count, self._queue.maxsize) or stopped()):
            self._ended.wait(0.001)
