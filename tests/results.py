"""Reads a job's results as a client would: every line must be one that OpenAI's own client can read."""

import copy
import json
import re
from pathlib import Path
from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from deserve.report.results import failure

FORMS = {"chat.completion": ChatCompletion, "text_completion": Completion}


def read_results(output: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    """The lines of a file of results, whole and valid."""
    data = (output / name).read_bytes()
    assert not data or data.endswith(b"\n")
    return [checked(json.loads(line)) for line in data.splitlines()]


def checked(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of results, which must be one of OpenAI's Batch API: an answer, an error with a status, or one without."""
    assert entry.keys() == {"id", "custom_id", "response", "error"}, entry
    assert entry["id"].startswith("batch_req_") and isinstance(entry["custom_id"], str)
    response = entry["response"]
    if response is None:
        assert entry["error"].keys() == {"code", "message"}, entry
        return entry
    assert entry["error"] is None and response.keys() == {"status_code", "request_id", "body"}, entry
    body = response["body"]
    if response["status_code"] == 200:
        FORMS[body["object"]].model_validate(typed(body), strict=True)
    else:
        assert 400 <= response["status_code"] < 600 and body.keys() == {"error"}, entry
        ErrorObject.model_validate(body["error"], strict=True)
    return entry


def typed(body: dict[str, Any]) -> dict[str, Any]:
    """A body as the client's types have it: they do not know that an echoed prompt's first token has null for its
    log-probability, as OpenAI's API gives it."""
    body = copy.deepcopy(body)
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        if logprobs and "token_logprobs" in logprobs and logprobs["token_logprobs"][0] is None:
            assert logprobs["top_logprobs"][0] is None
            logprobs["token_logprobs"][0], logprobs["top_logprobs"][0] = 0.0, {}
    return body


def code(entry: dict[str, Any]) -> str | None:
    """The code of an error line, None for an answer."""
    error = failure(entry)
    return None if error is None else error["code"]


def page_data(path: Path) -> dict[str, Any]:
    """What the report.html at `path` carries; it must end where its element does."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert len(found) == 1
    data: dict[str, Any] = json.loads(found[0])
    return data
