"""Results on their way to the disk, behind the visits."""

import queue
import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from deserve.batch import Completion, IntArray, Request
from deserve.errors import UserError
from deserve.model.tools import Answer
from deserve.report.progress import Progress
from deserve.report.results import ResultsWriter
from deserve.report.unfinished import Unfinished
from deserve.workload import Rejected

NON_FINITE_LIMIT = 16  # so many requests, the first of the job, without a finite logit: the others will fare no better


class Recorder:
    """Decodes completions and writes results in a thread, in the order in which they come.

    `non_finite` counts the requests that ended because their logits, computed in `dtype`, were NaN or infinite. When
    the first NON_FINITE_LIMIT requests all end so, the next `put` or `close` raises UserError.
    """

    def __init__(
        self,
        writer: ResultsWriter,
        unfinished: Unfinished,
        read: Callable[[Completion], Answer],
        progress: Progress,
        dtype: torch.dtype,
    ):
        self._writer, self._read, self._progress, self._dtype = writer, read, progress, dtype
        self._unfinished = unfinished
        self.non_finite = 0
        self._finite = False  # whether any request ended otherwise
        self._answers: dict[str, list[Completion]] = {}  # by custom_id, of requests that want several
        self._queue: queue.Queue[Completion | Rejected | list[Request] | threading.Event | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def put(self, outcome: Completion | Rejected | list[Request]) -> None:
        """Have `outcome` written, or how far the answers in flight have come after all that was put before.

        Raises the thread's error, if it met one (a full disk, say).
        """
        if self._error is not None:
            raise self._error
        self._queue.put(outcome)

    def save_due_s(self, checkpoint_s: float) -> float:
        """Seconds from one copy of the answers in flight to the next; see `Unfinished`."""
        return self._unfinished.due_s(checkpoint_s)

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was put is written, for `timeout_s` at most."""
        written = threading.Event()
        self._queue.put(written)
        written.wait(timeout_s)

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
                    self._refused(outcome.custom_id, outcome.code, outcome.message)
                elif isinstance(outcome, threading.Event):
                    outcome.set()
                elif isinstance(outcome, list):
                    self._unfinished.save(outcome)
                else:
                    answers = [*self._answers.pop(outcome.request.custom_id, []), outcome]
                    if len(answers) < outcome.request.answers:
                        self._answers[outcome.request.custom_id] = answers
                        self._unfinished.whole(outcome)
                    else:
                        self._request(answers)
                        self._unfinished.answered(outcome.request)
            self._unfinished.write()
        except BaseException as error:
            self._error = error

    def _request(self, answers: list[Completion]) -> None:
        """Write all that one request gets."""
        failed = next((answer for answer in answers if answer.finish_reason in ("error", "dead_end")), None)
        if failed is None:
            self._finite = True
            answers = _as_wanted(sorted(answers, key=lambda each: each.request.choice))
            read = [(answer, self._read(answer)) for answer in answers]
            self._writer.completion(*read[0], *read[1:])
            self._progress.request(*answers)
        elif failed.finish_reason == "error":
            self._non_finite_logits(failed)
        else:
            self._refused(
                failed.request.custom_id,
                "no_token_allowed",
                f"{_prompt(failed)}after {len(failed.tokens)} tokens no token is left that the request's grammar, "
                "allowed_token_ids, bad_words and min_tokens all allow",
            )

    def _refused(self, custom_id: str, code: str, message: str) -> None:
        self._writer.error(custom_id, code, message)
        self._progress.request(error=(custom_id, code, message))

    def _non_finite_logits(self, completion: Completion) -> None:
        reason = f"NaN or infinite logits after {len(completion.tokens)} tokens in {remedy(self._dtype)}"
        self._refused(completion.request.custom_id, "non_finite_logits", _prompt(completion) + reason)
        self.non_finite += 1
        if self.non_finite == NON_FINITE_LIMIT and not self._finite:
            raise UserError(f"the first {NON_FINITE_LIMIT} requests all ended with {reason}")


def _as_wanted(answers: list[Completion]) -> list[Completion]:
    """The answers to a line in their order: all have their prompt's log-probabilities, none has tokens to drop."""
    scores: dict[int, IntArray | None] = {}
    wanted = []
    for answer in answers:
        shared = scores.setdefault(answer.request.prompt_number, answer.prompt_beside)
        answer = replace(answer, prompt_beside=shared)
        if answer.request.form.prompt_only:
            beside = None if answer.beside is None else answer.beside[:0]
            answer = replace(answer, tokens=answer.tokens[:0], beside=beside, text=None, finish_reason="length")
        wanted.append(answer)
    return wanted


def _prompt(completion: Completion) -> str:
    """Names the prompt of a line that has several."""
    request = completion.request
    return f"prompt[{request.prompt_number}]: " if request.answers > request.sampling.n else ""


def remedy(dtype: torch.dtype) -> str:
    """What to do about numbers that left the range of `dtype`; begins with its name."""
    if dtype == torch.float16:
        return "float16, whose largest number is 65,504: set model.dtype=bfloat16 or model.dtype=float32"
    damaged = "the weights are damaged or belong to another architecture"
    if dtype == torch.bfloat16:
        return f"bfloat16: set model.dtype=float32; if that does not help, {damaged}"
    return f"float32: {damaged}"
