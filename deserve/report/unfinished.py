"""`unfinished.jsonl`: the answers in flight, so that a start of a killed or stopped job goes on with them.

Draws depend on seed and position alone, so a sequence that is prefilled with its prompt and its answer so far goes on
as it would have. The file has a header and a line per answer, and is replaced as a whole. It is small, a few MB, but
for log-probabilities: 20 a token make 220 KB of an answer of 1,000 tokens.
"""

import json
import sys
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from deserve.batch import Begun, Completion, Key, Request, decode_words, encode_words
from deserve.report.files import replace_file

FORMAT = 2
SOONEST_S = 0.25  # between two copies
CHEAP, MOST = 0.02, 0.05  # of the time, that copies may take: to come sooner than they must, and at all


@dataclass(frozen=True)
class _Saved:
    """An answer of the request with this `digest`. `finish_reason`: None unless it is whole."""

    digest: str
    begun: Begun
    finish_reason: str | None = None
    text: str | None = None


class Unfinished:
    """The answers that have no line of results yet, in memory and in the file at `path`.

    A file that is torn, or of another model (`model` is what identifies it), is ignored, which is said in one line. So
    is what it holds for requests in `done`. Answers that come with the log-probabilities of their prompt are not kept:
    the prompt would be computed again for these. All but `continued` is for one thread.
    """

    def __init__(self, path: Path, model: Any, done: Container[str] = ()):
        self._path = path
        self._job = _digest(json.dumps(model).encode())
        self._failed = False
        self._took_s = 0.0  # to make the last copy
        self.resumed_tokens = self.resumed = 0  # tokens and answers with which sequences have started
        found, problem = self._read()
        if problem is not None:
            _say(f"{path} {problem}: it is ignored, and the answers that it held are computed anew")
        self._found = {key: saved for key, saved in found.items() if key[0] not in done}
        self._left = dict(self._found)

    def continued(self, request: Request) -> Request | Completion:
        """`request` with the answer that an earlier start has begun, if there is one; the completion if it is whole."""
        saved = self._found.get(request.key)
        if saved is None or saved.digest != _digest_of(request):
            return request
        self.resumed += 1
        self.resumed_tokens += len(saved.begun.tokens)
        request = replace(request, begun=saved.begun)
        if saved.finish_reason is None:
            return request
        begun = saved.begun
        return Completion(request, begun.tokens, saved.finish_reason, saved.text, begun.beside, begun.cached_tokens)

    def due_s(self, checkpoint_s: float) -> float:
        """Seconds from one copy to the next: at most `checkpoint_s`, unless they are so large that they take long."""
        return max(min(checkpoint_s, max(SOONEST_S, self._took_s / CHEAP)), self._took_s / MOST)

    def save(self, answers: Iterable[Request]) -> None:
        """How far the answers in flight have come, to the file at once."""
        begin = time.monotonic()
        self.note(answers)
        self.write()
        self._took_s = time.monotonic() - begin

    def note(self, answers: Iterable[Request]) -> None:
        """How far the answers in flight have come."""
        for request in answers:
            if request.sampling.prompt_logprobs is None:
                self._left[request.key] = _Saved(_digest_of(request), request.begun)

    def whole(self, completion: Completion) -> None:
        """One of several answers to a request is whole, and waits for the others."""
        request = completion.request
        if request.sampling.prompt_logprobs is not None:
            return
        begun = Begun(completion.tokens, completion.beside, completion.cached_tokens)
        saved = _Saved(_digest_of(request), begun, completion.finish_reason, completion.text)
        self._left[request.key] = saved

    def answered(self, request: Request) -> None:
        """All answers to the line of `request` are whole and written."""
        for choice in range(request.answers):
            self._left.pop((request.custom_id, choice), None)

    def write(self) -> None:
        """Bring the file up to date. If that fails, the job goes on without, which is said once."""
        try:
            if self._left:
                lines = [_line(key, saved) for key, saved in self._left.items()]
                header = {"format": FORMAT, "job": self._job, "digest": _digest(*lines)}
                replace_file(self._path, json.dumps(header).encode() + b"\n", *lines)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            if not self._failed:
                _say(f"{self._path} cannot be written: {error.strerror}; a kill of the job loses answers in flight")
            self._failed = True

    def _read(self) -> tuple[dict[Key, _Saved], str | None]:
        """What the file holds, or nothing and what is wrong with it."""
        try:
            header, _, body = self._path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return {}, None
        except OSError as error:
            return {}, f"cannot be read ({error.strerror})"
        try:
            said = json.loads(header)
            if said["digest"] != _digest(body):
                return {}, "is torn"
            if said["format"] != FORMAT:
                return {}, "was written by another version"
            if said["job"] != self._job:
                return {}, "is of another model"
            return dict(map(_entry, body.splitlines())), None
        except (ValueError, TypeError, KeyError):
            return {}, "is torn"


def _line(key: Key, saved: _Saved) -> bytes:
    begun = saved.begun
    entry = {
        "custom_id": key[0],
        "choice": key[1],
        "request": saved.digest,
        "tokens": encode_words(begun.tokens),
        "beside": encode_words(begun.beside),
        "cached_tokens": begun.cached_tokens,
        "finish_reason": saved.finish_reason,
        "text": saved.text,
    }
    return json.dumps(entry).encode() + b"\n"


def _entry(line: bytes) -> tuple[Key, _Saved]:
    entry = json.loads(line)
    begun = Begun(decode_words(entry["tokens"]), decode_words(entry["beside"]), entry["cached_tokens"])
    return (entry["custom_id"], entry["choice"]), _Saved(entry["request"], begun, entry["finish_reason"], entry["text"])


def _digest(*data: bytes) -> str:
    digest = blake2b(digest_size=16)
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _digest_of(request: Request) -> str:
    """Of all that decides the answer: the prompt and how tokens are chosen."""
    return _digest(request.prompt.tobytes() + repr(request.sampling).encode())


def _say(message: str) -> None:
    print(f"deserve: {message}", file=sys.stderr, flush=True)
