"""`results.jsonl` in the OpenAI Batch output format, and what makes it safe to resume: manifest and lock."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from deserve.batch import Completion
from deserve.config import Config
from deserve.errors import UserError
from deserve.model.tools import Answer
from deserve.report.files import replace_file
from deserve.workload import data_paths
from deserve.workload.dialogues import SOURCES

WAYS_OUT = "Start afresh with output.resume=false (old results are kept aside), or give a new output.dir"
CHUNK_BYTES = 1 << 20
UNFINISHED = "unfinished.jsonl"  # answers in flight, as `deserve.report.unfinished` keeps them

# Codes of errors that another plan, setting or model folder may mend; all others are the input's own.
MENDABLE = {
    "context_length_exceeded",
    "kv_memory_exceeded",
    "line_too_long",
    "model_not_found",
    "no_chat_template",
    "no_tokenizer",
    "non_finite_logits",
    "unknown_parameter",
    "unsupported_parameter",
}

# Codes of lines that never reached an endpoint. As in OpenAI's Batch API, all other errors have a status: 400, or this.
NOT_RUN = {
    "duplicate_custom_id",
    "invalid_json",
    "invalid_method",
    "invalid_request",
    "invalid_url",
    "invalid_utf8",
    "line_too_long",
    "unsupported_url",
}
STATUS = {"model_not_found": 404, "non_finite_logits": 500}


@dataclass(frozen=True)
class Manifest:
    """What a job's results depend on; results of different manifests do not belong into one file.

    `input` identifies the requests: the source's name, and size and sha256 of each file, wherever it lies.
    `model` is whatever JSON value identifies weights and tokenizer, `dtype` the one that is computed in.
    Left out on purpose: `workload.limit`, as a job may be resumed with a larger one; what decides only whether a
    request is accepted; devices and the plan, which move answers no further than rounding does.
    `began` is when the job first started, and not compared: chat templates that print the date print this one, so that
    a resumed job has the same prompts.
    """

    input: dict[str, Any]
    model: Any
    dtype: str
    sampling: dict[str, Any]
    chats: dict[str, Any]  # the job's own chat template, and what becomes of thoughts
    coded: dict[str, str] = field(default_factory=dict)  # what is rounded to 8 bits on the way, if anything
    paths: tuple[Path, ...] = ()  # of the input's files, in their order
    began: str = field(default_factory=lambda: datetime.now().isoformat(timespec="seconds"))

    @classmethod
    def of(cls, config: Config, model: Any, dtype: str) -> "Manifest":
        """The manifest of a job. Raises UserError where an input file cannot be read."""
        paths = data_paths(config)
        source = config.workload.source
        template = config.workload.chat_template
        templates = [] if template is None else [Path(template).expanduser()]
        fingerprints = {}
        for key, group in {"workload.source": paths, "workload.chat_template": templates}.items():
            try:
                fingerprints[key] = [_file_fingerprint(path) for path in group]
            except OSError as error:
                raise UserError(f"{key}: {error.filename} cannot be read: {error.strerror}") from error
        files = fingerprints["workload.source"]
        if config.workload.shared_tokens:
            source += f", the first {config.workload.shared_tokens} tokens shared"
        named = {"source": None if paths and config.workload.source not in SOURCES else source, "files": files}
        chats = {"template": fingerprints["workload.chat_template"], "reasoning": config.workload.reasoning}
        formats = {"comm.activations": config.comm.activations, "kvcache.dtype": config.kvcache.dtype}
        coded = {key: value for key, value in formats.items() if value != "auto"}
        return cls(named, model, dtype, dataclasses.asdict(config.sampling), chats, coded, tuple(paths))

    def changed_file(self) -> Path | None:
        """A file of the input that is gone, or does not begin any more as it was when this manifest was made."""
        for path, fingerprint in zip(self.paths, self.input["files"], strict=True):
            try:
                if _file_fingerprint(path, fingerprint["size"]) != fingerprint:
                    return path
            except FileNotFoundError:
                if self.input["source"] is not None:  # a file of requests is open, and its lines are counted
                    return path
        return None

    def continuing(self, path: Path) -> "Manifest":
        """This manifest with the time at which the job of the one at `path` first started, if that says one."""
        try:
            began = str(json.loads(path.read_bytes())["began"])
            return dataclasses.replace(self, began=datetime.fromisoformat(began).isoformat())
        except (OSError, ValueError, TypeError, KeyError):
            return self

    def check(self, path: Path) -> bool:
        """Whether the input has grown by lines since the manifest at `path` was written.

        Raises UserError, saying what changed, if that manifest is of another job.
        """
        try:
            before = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path} is missing: nothing says what the results there answer. {WAYS_OUT}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}). {WAYS_OUT}") from error
        now = self._as_json()
        names = {
            "input": "input (workload.source)",
            "model": "model",
            "dtype": "model.dtype",
            "sampling": "sampling parameters",
            "chats": "workload.chat_template or workload.reasoning",
            "coded": "comm.activations or kvcache.dtype",
        }
        before = {"coded": {}} | before if isinstance(before, dict) else {}  # older manifests lack it
        grown = self._has_grown(before.get("input"))
        changed = ", ".join(
            name for key, name in names.items() if before.get(key) != now[key] and not (key == "input" and grown)
        )
        if changed:
            raise UserError(f"{path.parent} holds results of another job, with other {changed}. {WAYS_OUT}")
        return grown

    def _has_grown(self, before: Any) -> bool:
        """Whether the input is a file of requests whose first lines are all of the file that `before` describes."""
        try:
            (old,) = before["files"]
            (now,) = self.input["files"]
            if self.input["source"] is not None or before["source"] is not None or old["size"] >= now["size"]:
                return False
            if _file_fingerprint(self.paths[0], old["size"]) != old:
                return False
            with self.paths[0].open("rb") as file:
                file.seek(max(0, old["size"] - 1))
                return old["size"] == 0 or b"\n" in file.read(2)  # the last line has not grown, but ended there
        except (TypeError, KeyError, ValueError, OSError):
            return False

    def write(self, path: Path) -> None:
        """Replace the file at `path`. Raises UserError."""
        try:
            replace_file(path, json.dumps(self._as_json(), indent=2).encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error

    def _as_json(self) -> dict[str, Any]:
        keys = ("input", "model", "dtype", "sampling", "chats", "coded", "began")
        shown = {key: getattr(self, key) for key in keys}
        as_json: dict[str, Any] = json.loads(json.dumps(shown))
        return as_json


class _Log:
    """An append-only file of lines. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path, size: int, opened: contextlib.ExitStack):
        self._path, self._size = path, size  # bytes, all of whole lines
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        opened.callback(os.close, self._file)
        opened.callback(os.fsync, self._file)
        os.ftruncate(self._file, size)

    def append(self, data: bytes) -> None:
        """Append a line; if the disk is full, nothing of it stays. Raises UserError."""
        line, written = memoryview(data), 0
        try:
            while written < len(line):  # once, unless the disk is nearly full
                written += os.write(self._file, line[written:])
        except OSError as problem:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise UserError(f"{self._path} cannot be written: {problem.strerror}") from problem
        self._size += len(line)


class ResultsWriter:
    """The one writer of a results file, from opening to `close`; a context manager.

    With `resume`, `done` holds the `custom_id`s of earlier starts that are not to be answered again, and a line
    torn by a crash is cut off; without it, an old file is kept aside as `results.jsonl.1`, `.2`, ... Of several
    lines of one request the last one counts: `retry_errors` (`auto`: those in `MENDABLE`, `all`, `none`) says
    which errors are tried again, `retried` how many. A file of nothing but such errors is kept aside if it is of
    another job. `began` is when the job first started.

    With `separate_errors`, errors go to `errors.jsonl` beside it. Then an answer counts before any error.

    Raises UserError if the folder cannot be written, if another process writes to it, if a line other than
    the last is corrupt, or if the results there are of another job than `manifest` says.
    """

    def __init__(
        self,
        path: Path,
        resume: bool,
        model_name: str,
        manifest: Manifest | None = None,
        retry_errors: str = "auto",
        separate_errors: bool = False,
    ):
        self.path = path
        self.done: set[str] = set()
        self._to_retry: dict[str, int] = {}  # by custom_id, the hash of code and message
        self._model_name, self._retry_errors = model_name, retry_errors
        paths = [path.with_name("errors.jsonl"), path]
        self._errors_path = paths[0] if separate_errors else path
        with contextlib.ExitStack() as opened:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(path.parent / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
                opened.callback(os.close, self._lock)
                _lock(self._lock, path.parent)
                unfinished = path.with_name(UNFINISHED)
                if not resume:
                    _set_aside(*paths, unfinished)
                sizes = {path: self._read_done(path) for path in paths}
                self.retried = len(self._to_retry)
                must_write = manifest is not None and self._must_write(manifest, sizes)
                if manifest is not None and (any(sizes.values()) or unfinished.exists()):
                    manifest = manifest.continuing(path.parent / "manifest.json")
                self.began = datetime.now() if manifest is None else datetime.fromisoformat(manifest.began)
                if manifest is not None and must_write:
                    manifest.write(path.parent / "manifest.json")
                self._answers = _Log(path, sizes[path], opened)
                self._errors = self._answers
                if separate_errors:
                    self._errors = _Log(self._errors_path, sizes[self._errors_path], opened)
            except FileExistsError:
                raise UserError(f"output.dir={path.parent} is a file: give a folder, new or old") from None
            except OSError as error:
                raise UserError(f"output.dir={path.parent} cannot be written: {error}") from error
            self._opened = opened.pop_all()

    def completion(self, completion: Completion, answer: Answer, *others: tuple[Completion, Answer]) -> None:
        """Append the line of an answered request, which has `others` too where it asks for several."""
        request = completion.request
        name = _name(request.custom_id)
        chat = request.endpoint == "/v1/chat/completions"
        all_of_them = [(completion, answer), *others]
        prompts = [one for one, _ in all_of_them if one.request.choice % request.sampling.n == 0]
        prompt_tokens = sum(len(one.request.prompt) for one in prompts)
        completion_tokens = sum(len(one.tokens) for one, _ in all_of_them)
        body: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._model_name,
            "choices": [_choice(name, chat, *one) for one in all_of_them],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
            },
        }
        if answer.reasoning is not None:
            thoughts = sum(one.reasoning_tokens for _, one in all_of_them)
            body["usage"]["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        if chat:  # where vLLM has them
            if request.form.return_token_ids:
                body["prompt_token_ids"] = request.prompt.tolist()
            if answer.prompt_logprobs is not None:
                body["prompt_logprobs"] = answer.prompt_logprobs
        self._append(self._answers, request.custom_id, (200, body), None)

    def error(self, custom_id: str, code: str, message: str) -> None:
        """Append the line of a request that cannot be answered, unless it is the one that an earlier start wrote."""
        if self._to_retry.pop(custom_id, None) == hash((code, message)):
            return
        if code in NOT_RUN:
            self._append(self._errors, custom_id, None, {"code": code, "message": message})
            return
        status = STATUS.get(code, 400)
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        self._append(self._errors, custom_id, (status, {"error": error}), None)

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

    def _append(
        self,
        log: _Log,
        custom_id: str,
        response: tuple[int, dict[str, Any]] | None,
        error: dict[str, Any] | None,
    ) -> None:
        """Append the line of a request to `log`; `response` is a status and a body."""
        name = _name(custom_id)
        entry: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": None, "error": error}
        if response is not None:
            status, body = response
            entry["response"] = {"status_code": status, "request_id": f"req_{name}", "body": body}
        # json.dumps leaves ASCII only: text may hold what other readers take for the end of a line (U+2028).
        log.append(json.dumps(entry).encode() + b"\n")

    def _must_write(self, manifest: Manifest, sizes: dict[Path, int]) -> bool:
        path = self.path.with_name("manifest.json")
        if self.done:
            return manifest.check(path)
        try:
            return not any(sizes.values()) or manifest.check(path)
        except UserError:
            _set_aside(*sizes)
            self._to_retry.clear()
            self.retried = 0
            sizes.update(dict.fromkeys(sizes, 0))
            return True

    def _read_done(self, path: Path) -> int:
        """Fill `done` from a file; returns its length in bytes up to the last whole line."""
        if not path.exists():
            return 0
        size, torn = 0, None
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if torn is not None:
                    raise UserError(f"{path}: line {torn} is corrupt; mend or remove it. {WAYS_OUT}")
                entry = _entry(line)
                if entry is None:
                    torn = number
                    continue
                custom_id, error = entry["custom_id"], failure(entry)
                self.done.add(custom_id)
                self._to_retry.pop(custom_id, None)
                if error is not None and self._is_retried(error["code"]):
                    self.done.remove(custom_id)
                    # An error that stays the same is not written again, unless to the other file.
                    same = path == self._errors_path
                    self._to_retry[custom_id] = hash((error["code"], error["message"])) if same else 0
                size += len(line)
        return size

    def _is_retried(self, code: Any) -> bool:
        return self._retry_errors == "all" or (self._retry_errors == "auto" and code in MENDABLE)


def _choice(name: str, chat: bool, completion: Completion, answer: Answer) -> dict[str, Any]:
    """One of `choices`, of the request whose ids share `name`."""
    request, reason = completion.request, completion.finish_reason
    said: dict[str, Any] = {"text": answer.content}
    if chat:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            own = f"{name}/{request.choice}" if request.choice else name
            message["tool_calls"] = answer.tool_calls(own, request.form.dialect)
            reason = "tool_calls" if reason == "stop" else reason
        said = {"message": message}
    choice = {"index": request.choice, **said, "logprobs": answer.logprobs, "finish_reason": reason}
    if request.form.return_token_ids:
        choice["token_ids"] = completion.tokens.tolist()
        if not chat:
            choice["prompt_token_ids"] = request.prompt.tolist()
    if answer.prompt_logprobs is not None and not chat:
        choice["prompt_logprobs"] = answer.prompt_logprobs
    return choice


def failure(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Code and message of a line of results, None for an answer."""
    response, error = entry.get("response"), entry.get("error")
    if isinstance(response, dict) and response.get("status_code") != 200:
        body = response.get("body")
        error = body.get("error") if isinstance(body, dict) else {}
    return {key: error.get(key) for key in ("code", "message")} if isinstance(error, dict) else None


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of results, None if it is not whole."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    named = isinstance(entry, dict) and isinstance(entry.get("custom_id"), str)
    return entry if named and line.endswith(b"\n") else None


def _name(custom_id: str) -> str:
    """What the ids within a request's line share: the same in every run, unlike a random one."""
    return hashlib.blake2b(custom_id.encode(), digest_size=12).hexdigest()


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it however the process ends
    except BlockingIOError:
        raise UserError(f"output.dir={folder} is in use by another job: wait for it, or give another") from None


def _set_aside(*paths: Path) -> None:
    """Rename files, all with the same new number."""
    number = 1
    while any(path.with_name(f"{path.name}.{number}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(path.with_name(f"{path.name}.{number}"))


def _file_fingerprint(path: Path, size: int | None = None) -> dict[str, Any]:
    """Size and sha256 of a file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)):
            digest.update(chunk)
            left = None if left is None else left - len(chunk)
        return {"sha256": digest.hexdigest(), "size": file.tell()}
