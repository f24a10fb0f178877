"""What a ring's first rank and rank 0 tell each other: reports one way, portions of requests the other; as JSON.

A report names its requests by `custom_id` and `choice`: rank 0 keeps them as they were read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from pydantic import TypeAdapter

from deserve.batch import Begun, Completion, Key, Request, SamplingParams, decode_words, encode_words

Outcome: TypeAlias = Completion | list[Request]  # of an answer in flight, what is begun

SAMPLING = TypeAdapter(SamplingParams)


@dataclass
class Report:
    """What has become of a ring's requests since its last report, and how many more it can take.

    `tokens` were sampled in so many `trips` of a sequence round the ring. `saves`: the job has failed, and all that was
    in flight is among `outcomes`. `closes`: nothing follows.
    """

    wants: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    tokens: int = 0
    trips: int = 0
    saves: bool = False
    closes: bool = False


@dataclass
class Portion:
    """Requests for a ring. `last`: it gets no more."""

    requests: list[Request] = field(default_factory=list)
    last: bool = False


def encode_portion(portion: Portion) -> dict[str, Any]:
    return {"requests": [_encode_request(request) for request in portion.requests], "last": portion.last}


def decode_portion(raw: dict[str, Any]) -> Portion:
    return Portion([_decode_request(request) for request in raw["requests"]], raw["last"])


def encode_report(report: Report) -> dict[str, Any]:
    return vars(report) | {"outcomes": [_encode_outcome(outcome) for outcome in report.outcomes]}


def decode_report(raw: dict[str, Any], requests: Mapping[Key, Request]) -> Report:
    """`requests`: those that the ring has."""
    return Report(**{**raw, "outcomes": [_decode_outcome(outcome, requests) for outcome in raw["outcomes"]]})


def _encode_request(request: Request) -> dict[str, Any]:
    return {
        "custom_id": request.custom_id,
        "choice": request.choice,
        "prompt": encode_words(request.prompt),
        "sampling": SAMPLING.dump_python(request.sampling),
        "begun": _encode_begun(request.begun),
    }


def _decode_request(raw: dict[str, Any]) -> Request:
    return Request(
        raw["custom_id"],
        decode_words(raw["prompt"]),
        SAMPLING.validate_python(raw["sampling"]),
        choice=raw["choice"],
        begun=_decode_begun(raw["begun"]),
    )


def _encode_outcome(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, list):
        return {"begun": [[request.key, _encode_begun(request.begun)] for request in outcome]}
    arrays = {name: encode_words(getattr(outcome, name)) for name in ("tokens", "beside", "prompt_beside")}
    plain = {entry.name: getattr(outcome, entry.name) for entry in fields(outcome) if entry.name not in arrays}
    return plain | arrays | {"request": outcome.request.key}


def _decode_outcome(raw: dict[str, Any], requests: Mapping[Key, Request]) -> Outcome:
    if "begun" in raw:
        return [replace(requests[_key(key)], begun=_decode_begun(begun)) for key, begun in raw["begun"]]
    arrays = {name: decode_words(raw[name]) for name in ("tokens", "beside", "prompt_beside")}
    return Completion(**{**raw, **arrays, "request": requests[_key(raw["request"])]})


def _encode_begun(begun: Begun) -> list[Any]:
    return [encode_words(begun.tokens), encode_words(begun.beside), begun.cached_tokens]


def _decode_begun(raw: list[Any]) -> Begun:
    tokens, beside, cached = raw
    return Begun(decode_words(tokens), decode_words(beside), cached)


def _key(raw: list[Any]) -> Key:
    return raw[0], raw[1]
