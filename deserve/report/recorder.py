"""Results on their way to the disk, behind the visits."""

import queue
import threading
from collections.abc import Callable

from deserve.batch import Completion, IntArray
from deserve.report.progress import Progress
from deserve.report.results import ResultsWriter
from deserve.workload import Rejected


class Recorder:
    """Decodes completions and writes results in a thread, in the order in which they come."""

    def __init__(self, writer: ResultsWriter, decode: Callable[[IntArray], str], progress: Progress):
        self._writer, self._decode, self._progress = writer, decode, progress
        self._queue: queue.Queue[Completion | Rejected | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def put(self, outcome: Completion | Rejected) -> None:
        """Have `outcome` written. Raises the thread's error, if it met one (a full disk, say)."""
        if self._error is not None:
            raise self._error
        self._queue.put(outcome)

    def close(self) -> None:
        """Write all that was put, then return."""
        self._queue.put(None)
        self._thread.join()
        self._writer.close()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        try:
            while (outcome := self._queue.get()) is not None:
                if isinstance(outcome, Rejected):
                    self._writer.error(outcome.custom_id, outcome.code, outcome.message)
                    self._progress.request(error=True)
                else:
                    text = outcome.text if outcome.text is not None else self._decode(outcome.tokens)
                    self._writer.completion(outcome, text)
                    self._progress.request(outcome)
        except BaseException as error:
            self._error = error
