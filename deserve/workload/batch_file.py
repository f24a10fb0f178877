"""JSONL files: OpenAI Batch requests, and the short forms `{"prompt": ...}` and `{"messages": [...]}`."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from deserve.errors import RequestError, UserError, brief
from deserve.workload.intake import Intake
from deserve.workload.item import Answered, Item, Rejected
from deserve.workload.records import MB
from deserve.workload.schema import CHAT, COMPLETIONS, Id, Line, check_keys, validated

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before the first line
HEAD = 1 << 16  # bytes of a file that are looked at to tell its form
ARRAY = re.compile(rb'\[\s*(["{]|$)')  # of objects or texts
FIRST_KEY = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*"([^"\\]+)"')  # as most programs write lines
URLS = {CHAT: CHAT, COMPLETIONS: COMPLETIONS, "/chat/completions": CHAT, "/completions": COMPLETIONS}  # Azure's lack v1
# Endpoints of OpenAI's and vLLM's batches that generate no text from a prompt, or not in these forms.
OTHER_URLS = {"/v1/embeddings", "/embeddings", "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"}
OTHER_URLS |= {"/v1/responses", "/v1/moderations", "/v1/images/generations", "/v1/images/edits", "/v1/videos"}
OTHER_URLS |= {"/v1/audio/transcriptions", "/v1/audio/translations"}

# How a file begins that is not made of lines of UTF-8, what it is, and how to make it so.
FOREIGN = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it with gunzip"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("a Parquet file", "write it as JSON lines, with pandas' DataFrame.to_json(orient='records', lines=True)"),
    **{
        begin: (f"in {code}", f"convert it with iconv -f {code} -t UTF-8")
        for code, begins in {
            "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
            "UTF-32LE": (b"{\0\0\0",),
            "UTF-32BE": (b"\0\0\0{",),
            "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
            "UTF-16LE": (b"{\0",),
            "UTF-16BE": (b"\0{",),
        }.items()
        for begin in begins
    },
}
# Keys that only lines of other programs have, and whose they are.
OTHERS = {
    "params": "Anthropic's Message Batches",
    "request": "Gemini's batches",
    "modelInput": "Amazon Bedrock's batches",
    "response": "a file of results",
}


def lines(path: Path, max_line_mb: float) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, with their 1-based numbers; None in place of one of more than `max_line_mb`.

    Raises UserError where reading fails, or the file is not one of JSON lines in UTF-8.
    """
    most = int(max_line_mb * MB)
    try:
        with BufferedReader(path.open("rb", buffering=0), HEAD) as file:
            _refuse_foreign(path, file.peek(HEAD))
            for number, raw in enumerate(_bounded(file, most), start=1):
                if number == 1 and raw is not None:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw is None or (raw and not raw.isspace()):
                    yield number, raw
    except OSError as error:
        raise UserError(f"workload.source={path} cannot be read: {error.strerror}") from error


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Raises UserError if a file that begins with `head` is in another form than lines of JSON in UTF-8."""
    for magic, (what, remedy) in FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"workload.source={path} is {what}, but must hold lines in UTF-8: {remedy}")
    begins = [line.strip() for line in head.removeprefix(BYTE_ORDER_MARK).split(b"\n") if line.strip()]
    if len(begins) < 3 and len(head) == HEAD:  # the second line goes on beyond it, if there is one
        begins = begins[:1] if begins[0].startswith(b"[") else []
    found = _form(begins[0], begins[min(1, len(begins) - 1)]) if begins else None
    if found is not None:
        what, remedy = found
        raise UserError(
            f"workload.source={path} holds {what}, but each request must be a JSON object on a line of its own, such "
            f'as {{"prompt": "Once upon a time"}}: {remedy}'
        )


def _form(first: bytes, second: bytes) -> tuple[str, str] | None:
    """What a file holds that begins with these lines, and how to convert it; None if one of them may be a request."""
    if ARRAY.match(first):
        return "a JSON array", "convert it with jq -c '.[]' FILE"
    if first.startswith(b"{") and not first.endswith((b"}", b"},")) and not second.startswith(b"{"):
        return "JSON that is spread over lines", "convert it with jq -c . FILE"
    if first.startswith(b"{") and first.endswith(b"},"):
        return "JSON with a comma behind each line", "take the commas away with sed 's/,[[:space:]]*$//' FILE"
    if not first or first[:1] in b"{[" or second[:1] in b"{[":
        return None
    for separator, name in ((b"\t", "tabs"), (b",", "commas"), (b";", "semicolons")):
        if first.count(separator) == second.count(separator) > 0:
            return (
                f"a table with {name} (CSV?)",
                "convert it with pandas, read_csv(FILE).to_json(OUT, orient='records', lines=True), where its column "
                "of prompts is named prompt",
            )
    return "plain text", "if each line is a prompt, convert it with jq -Rc '{prompt: .}' FILE"


def _bounded(file: BinaryIO, most: int) -> Iterator[bytes | None]:
    while raw := file.readline(most + 1):
        if len(raw) <= most or raw.endswith(b"\n"):
            yield raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MB)
        yield None


class BatchFile:
    """Reads lines into items: exactly one for each, a `Rejected` where the line is no request.

    `custom_id`s are unique. A line without one is `line-N`, N being its number; so is one that repeats
    another line's, as a result under the repeated id would be taken for the other line's.
    """

    def __init__(self, intake: Intake, max_line_mb: float, done: Container[str] = ()):
        self._intake, self._max_line_mb, self._done = intake, max_line_mb, done
        self._line_of: dict[int, int] = {}  # by a 64-bit hash: a million ids would be much memory for rank 0

    def item(self, line: int, raw: bytes | None) -> Item:
        """The item of one line, of which `lines` gave the bytes; `Answered` if its `custom_id` is in `done`."""
        if self._done and raw:
            answered = self._answered(line, raw)
            if answered is not None:
                return answered
        custom_id = None
        try:
            if raw is None:
                raise RequestError(
                    "line_too_long",
                    f"the line is longer than workload.max_line_mb={self._max_line_mb:g}: shorten it, or raise that",
                )
            entry, problem = _parse(raw)
            custom_id = self._custom_id(entry.pop("custom_id", None), line)
            if problem is not None:
                raise RequestError("invalid_json", f"not JSON: {problem}")
            if custom_id in self._done:
                return Answered(custom_id)
            endpoint, body = _endpoint_and_body(entry, self._intake.ignored)
            return self._intake.request(custom_id, line, endpoint, body)
        except RequestError as error:
            return Rejected(custom_id or self._line_id(line), line, error.code, f"line {line}: {error}")

    def _answered(self, line: int, raw: bytes) -> Answered | None:
        """What a line is that was answered before, where that can be told without parsing the line."""
        named = raw.count(b'"custom_id"')
        if not named:
            custom_id = self._line_id(line)
        elif named == 1 and (match := FIRST_KEY.match(raw)):
            custom_id = match[1].decode(errors="replace")
        else:
            return None
        return Answered(custom_id) if custom_id in self._done and self._claim(custom_id, line) == line else None

    def _custom_id(self, given: Any, line: int) -> str:
        """A number is taken by its decimal text: as a string it is joined to what the line came from."""
        if given is None:
            return self._line_id(line)
        custom_id = validated(Id, {"custom_id": given}).custom_id
        if not custom_id:
            raise RequestError("invalid_value", "custom_id is empty")
        first = self._claim(custom_id, line)
        if first != line:
            raise RequestError("duplicate_custom_id", f"custom_id {brief(custom_id)} is already that of line {first}")
        return custom_id

    def _line_id(self, line: int) -> str:
        custom_id = f"line-{line}"
        while self._claim(custom_id, line) != line:  # an earlier line may have chosen just this name
            custom_id += "'"
        return custom_id

    def _claim(self, custom_id: str, line: int) -> int:
        """The line that has `custom_id`: the first to have asked for it."""
        digest = hashlib.blake2b(custom_id.encode(), digest_size=8).digest()
        return self._line_of.setdefault(int.from_bytes(digest, "little"), line)


def _parse(raw: bytes) -> tuple[dict[str, Any], str | None]:
    """The object that a line holds, and what it holds that is no JSON although Python reads it."""
    problems = []

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            problems.append(f"an object has the key {brief(twice)} twice")
        return entry

    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError("invalid_utf8", f"not UTF-8 at byte {error.start + 1}") from None

    def parsed(parse_int: Callable[[str], int]) -> Any:
        try:
            return json.loads(
                text,
                parse_int=parse_int,
                parse_constant=lambda name: problems.append(f"{name} is not a JSON value"),
                object_pairs_hook=distinct,
            )
        except RecursionError:
            raise RequestError("invalid_json", "nested too deeply") from None
        except json.JSONDecodeError as error:
            raise RequestError("invalid_json", f"not JSON: {error.msg} at column {error.colno}") from None

    try:
        entry = parsed(int)
    except ValueError:
        problems.append("a number has thousands of digits")
        entry = parsed(lambda digits: int(digits[:9]))
    if not isinstance(entry, dict):
        raise RequestError("invalid_request", f"the line holds {brief(entry)}, but must hold an object")
    return entry, next(iter(problems), None)


def _endpoint_and_body(entry: dict[str, Any], ignored: Counter[str] | None) -> tuple[str, dict[str, Any]]:
    """Tell the two forms apart by `url` and `body`, which the short ones do not have. `entry` holds no `custom_id`."""
    short = "url" not in entry and "body" not in entry
    body: Any = entry if short else entry.get("body")
    other = next((key for key in OTHERS if entry.get(key) is not None), None)
    if other is not None and not (body.keys() & {"messages", "prompt"} if short else body):
        raise RequestError(
            "invalid_request",
            f"the line holds {other}, as {OTHERS[other]} do, but no body: it must be OpenAI's form, "
            '{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}',
        )
    if not short:
        check_keys(Line, entry, "a line beside its body", "", ignored)
    method = entry.get("method")
    if not short and method is not None and method != "POST":
        raise RequestError("invalid_method", f"method is {brief(method)}, but must be POST")
    url = entry.get("url")
    if isinstance(url, str) and url in OTHER_URLS:
        raise RequestError(
            "unsupported_url", f"url {url} is not supported: this job answers {CHAT} and {COMPLETIONS} only"
        )
    if url is not None and (not isinstance(url, str) or url not in URLS):
        raise RequestError("invalid_url", f"url is {brief(url)}, but must be {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        raise RequestError("invalid_request", f"body is {brief(body)}, but must be an object")
    if url is not None:
        return URLS[url], body
    given = [key for key in ("messages", "prompt") if body.get(key) is not None]
    if len(given) != 1:
        raise RequestError("missing_parameter", "the line needs url and body, or one of messages and prompt")
    return (CHAT if given == ["messages"] else COMPLETIONS), body
