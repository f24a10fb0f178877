"""JSONL files: OpenAI Batch requests, and the short forms `{"prompt": ...}` and `{"messages": [...]}`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from deserve.errors import RequestError, UserError
from deserve.workload.checks import brief, checked_text
from deserve.workload.intake import CHAT, COMPLETIONS, Intake
from deserve.workload.item import Item, Rejected

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before the first line


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their 1-based numbers. Raises UserError where reading fails."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw and not raw.isspace():
                    yield number, raw
    except OSError as error:
        raise UserError(f"workload.source={path} cannot be read: {error.strerror}") from error


class BatchFile:
    """Reads lines into items: exactly one for each, a `Rejected` where the line is no request.

    `custom_id`s are unique. A line without one is `line-N`, N being its number; so is one that repeats
    another line's, as a result under the repeated id would be taken for the other line's.
    """

    def __init__(self, intake: Intake):
        self._intake = intake
        self._line_of: dict[int, int] = {}  # by a 64-bit hash: a million ids would be much memory for rank 0

    def item(self, line: int, raw: bytes) -> Item:
        """The item of one line."""
        custom_id = None
        try:
            entry = _parse(raw)
            custom_id = self._custom_id(entry, line)
            endpoint, body = _endpoint_and_body(entry)
            return self._intake.request(custom_id, line, endpoint, body)
        except RequestError as error:
            return Rejected(custom_id or self._line_id(line), line, error.code, f"line {line}: {error}")

    def _custom_id(self, entry: dict[str, Any], line: int) -> str:
        if entry.get("custom_id") is None:
            return self._line_id(line)
        custom_id = checked_text(entry["custom_id"], "custom_id")
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


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError("invalid_utf8", f"not UTF-8 at byte {error.start + 1}") from None
    try:
        entry = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("invalid_json", "nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RequestError("invalid_json", f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits, or _refuse_constant
        raise RequestError("invalid_json", f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise RequestError("invalid_request", f"the line holds {brief(entry)}, but must hold an object")
    return entry


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _endpoint_and_body(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Tell the two forms apart by `url` and `body`, which the short ones do not have."""
    if "url" not in entry and "body" not in entry:
        given = [key for key in ("messages", "prompt") if entry.get(key) is not None]
        if len(given) != 1:
            raise RequestError("missing_parameter", "the line needs url and body, or one of messages and prompt")
        return (CHAT if given == ["messages"] else COMPLETIONS), entry
    url, body, method = entry.get("url"), entry.get("body"), entry.get("method")
    if method is not None and method != "POST":
        raise RequestError("invalid_method", f"method is {brief(method)}, but must be POST")
    if url not in (CHAT, COMPLETIONS):
        raise RequestError("invalid_url", f"url is {brief(url)}, but must be {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        raise RequestError("invalid_request", f"body is {brief(body)}, but must be an object")
    return url, body
