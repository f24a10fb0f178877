"""Errors that a user can cause, each with one message that says what to do."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in the configuration, the input or the model folder; the message names the key, file or line."""


class LastingError(UserError):
    """A mistake that no restart of the ranks mends, and that a restart would report in other words."""


class RequestError(Exception):
    """A request that cannot be answered; it becomes an `error` line of the results, the rest of the job runs.

    `code` is a short word for programs, the message is for people.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class LinkError(Exception):
    """A rank that this one depends on is gone, or the link to it; the message names both."""


def as_json(value: Any, most: int = 80) -> str:
    """A value as a file of JSON has it, for an error message: cut to `most` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="backslashreplace").decode()  # half of a surrogate pair cannot be printed
    return text if len(text) <= most else text[:most] + "..."


def brief(value: Any) -> str:
    """The same for a value of a request, which may be long: of lists and objects only that they are."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return as_json(value[:40] if isinstance(value, str) else value, most=60)


def tell_torchrun(message: str) -> None:
    """Hand `message` to the torchrun that started this process, if one did: its closing summary shows it.

    Source: torch.distributed.elastic.multiprocessing.errors, which reads the file that it names in the environment.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(content))
