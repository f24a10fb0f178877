"""`results.jsonl` in the OpenAI Batch output format, and what makes it safe to resume: manifest and lock."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from deserve.batch import Completion
from deserve.config import Config
from deserve.errors import UserError
from deserve.workload import data_paths

WAYS_OUT = "Start afresh with output.resume=false (old results are kept aside), or give a new output.dir"


@dataclass(frozen=True)
class Manifest:
    """What a job's results depend on; results of different manifests do not belong into one file.

    `input` identifies the requests: the source's name, or size and sha256 of each file, wherever it lies.
    `model` is whatever JSON value identifies weights and tokenizer. `workload.limit` is left out on purpose:
    a job may be resumed with a larger one.
    """

    input: Any
    model: Any
    sampling: dict[str, Any]

    @classmethod
    def of(cls, config: Config, model: Any) -> "Manifest":
        """The manifest of a job. Raises UserError where an input file cannot be read."""
        paths = data_paths(config)
        files = [_file_fingerprint(path) for path in paths]
        return cls(files or config.workload.source, model, dataclasses.asdict(config.sampling))

    def check(self, path: Path) -> None:
        """Raises UserError, saying what changed, if the manifest at `path` is that of another job."""
        try:
            before = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path} is missing: nothing says what the results there answer. {WAYS_OUT}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}). {WAYS_OUT}") from error
        now = self._as_json()
        names = {"input": "input (workload.source)", "model": "model", "sampling": "sampling parameters"}
        before = before if isinstance(before, dict) else {}
        changed = ", ".join(name for key, name in names.items() if before.get(key) != now[key])
        if changed:
            raise UserError(f"{path.parent} holds results of another job, with other {changed}. {WAYS_OUT}")

    def write(self, path: Path) -> None:
        """Replace the file at `path` in one step, so that a crash leaves the old or the new one."""
        scratch = path.with_suffix(".tmp")
        try:
            with scratch.open("w") as file:
                json.dump(self._as_json(), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as error:
            scratch.unlink(missing_ok=True)  # empty or half, where the disk is full
            raise UserError(f"{path} cannot be written: {error.strerror}") from error

    def _as_json(self) -> dict[str, Any]:
        as_json: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return as_json


class ResultsWriter:
    """The one writer of a results file, from opening to `close`; a context manager.

    With `resume`, `done` holds the `custom_id`s that earlier runs answered, and a line torn by a crash is cut
    off so that its request is answered again; without it, an old file is kept aside as `results.jsonl.1`,
    `.2`, ...

    Raises UserError if the folder cannot be written, if another process writes to it, if a line other than
    the last is corrupt, or if the results there are of another job than `manifest` says.
    """

    def __init__(self, path: Path, resume: bool, model_name: str, manifest: Manifest | None = None):
        self.path = path
        self.done: set[str] = set()
        self._model_name = model_name
        with contextlib.ExitStack() as opened:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(path.parent / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
                opened.callback(os.close, self._lock)
                _lock(self._lock, path.parent)
                if not resume:
                    _set_aside(path)
                exists = path.exists() and path.stat().st_size > 0
                if manifest is not None and exists:
                    manifest.check(path.parent / "manifest.json")
                elif manifest is not None:
                    manifest.write(path.parent / "manifest.json")
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                opened.callback(os.close, self._file)
                opened.callback(os.fsync, self._file)
                self._size = self._read_done()  # bytes, all of whole lines
                os.ftruncate(self._file, self._size)
            except FileExistsError:
                raise UserError(f"output.dir={path.parent} is a file: give a folder, new or old") from None
            except OSError as error:
                raise UserError(f"output.dir={path.parent} cannot be written: {error}") from error
            self._opened = opened.pop_all()

    def completion(self, completion: Completion, text: str) -> None:
        """Append the line of an answered request."""
        request = completion.request
        name = _name(request.custom_id)
        chat = request.endpoint == "/v1/chat/completions"
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        prompt_tokens, completion_tokens = len(request.prompt), len(completion.tokens)
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._model_name,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": completion.finish_reason}],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
        response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
        self._append(request.custom_id, response, None)

    def error(self, custom_id: str, code: str, message: str) -> None:
        """Append the line of a request that cannot be answered."""
        self._append(custom_id, None, {"code": code, "message": message})

    def close(self) -> None:
        """Bring all lines to the disk and let the next job in."""
        try:
            self._opened.close()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
        entry = {
            "id": f"batch_req_{_name(custom_id)}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        # json.dumps leaves ASCII only: text may hold what other readers take for the end of a line (U+2028).
        line = memoryview(json.dumps(entry).encode() + b"\n")
        written = 0
        try:
            while written < len(line):  # once, unless the disk is nearly full
                written += os.write(self._file, line[written:])
        except OSError as problem:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise UserError(f"{self.path} cannot be written: {problem.strerror}") from problem
        self._size += len(line)

    def _read_done(self) -> int:
        """Fill `done` from the file; returns its length in bytes up to the last whole line."""
        size, torn = 0, None
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if torn is not None:
                    raise UserError(f"{self.path}: line {torn} is corrupt; mend or remove it. {WAYS_OUT}")
                custom_id = _custom_id(line)
                if custom_id is None:
                    torn = number
                    continue
                self.done.add(custom_id)
                size += len(line)
        return size


def _custom_id(line: bytes) -> str | None:
    """The `custom_id` of a line of results, None if the line is not whole."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
    return custom_id if isinstance(custom_id, str) and line.endswith(b"\n") else None


def _name(custom_id: str) -> str:
    """What the ids within a request's line share: the same in every run, unlike a random one."""
    return hashlib.blake2b(custom_id.encode(), digest_size=12).hexdigest()


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it however the process ends
    except BlockingIOError:
        raise UserError(f"output.dir={folder} is in use by another job: wait for it, or give another") from None


def _set_aside(path: Path) -> None:
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)


def _file_fingerprint(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"sha256": digest, "size": file.tell()}
    except OSError as error:
        raise UserError(f"workload.source: {path} cannot be read: {error.strerror}") from error
