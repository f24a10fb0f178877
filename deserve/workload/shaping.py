"""What a request asks of its answer's tokens beyond temperature: rules, a grammar, log-probabilities."""

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

from deserve.batch import ADMISSION_ROOM, Rules, SamplingParams
from deserve.errors import RequestError, brief
from deserve.model.admissions import extra_words
from deserve.model.grammar import Kind, checked_grammar
from deserve.model.tools import MARKS
from deserve.model.tools import grammar as call_grammar
from deserve.workload.item import Limits, Tokenizer
from deserve.workload.schema import Body, ChatBody, CompletionBody, NamedTool, Shaping

CHECKED = 4096  # grammars that need no checking when they come again
KEYS = {*Shaping.model_fields, "logprobs", "top_logprobs", "tool_choice"}


def shaped(
    sampling: SamplingParams, body: Body, prompt: int, tokenizer: Tokenizer | None, limits: Limits
) -> SamplingParams:
    """`sampling` with what `body` says beside it, of a request whose prompt has `prompt` tokens.

    Raises RequestError for a token id that the model does not have, for a grammar that cannot be compiled, and where
    two keys contradict each other.
    """
    if not body.model_fields_set & KEYS:
        return sampling
    rules = Rules(
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        bias=tuple((_token(key, "logit_bias", limits), bias) for key, bias in (body.logit_bias or {}).items()),
        allowed=tuple(_token(token, "allowed_token_ids", limits) for token in body.allowed_token_ids or ()),
        banned=tuple(ids for word in body.bad_words or () for ids in _spellings(word, tokenizer)),
        min_tokens=body.min_tokens or 0,
        ends=tuple(_token(token, "stop_token_ids", limits) for token in sampling.stop_token_ids if body.min_tokens),
    )
    if body.allowed_token_ids == []:
        raise RequestError("invalid_value", "allowed_token_ids is empty, so no token may be chosen")
    if rules.min_tokens > sampling.max_tokens:
        raise RequestError(
            "invalid_value", f"min_tokens is {rules.min_tokens}, but max_tokens is {sampling.max_tokens}"
        )
    grammar = _grammar(body, tokenizer)
    if grammar is not None and tokenizer is None:
        raise RequestError("no_tokenizer", "the model has no tokenizer, so an answer cannot keep to a grammar")
    if grammar is not None and sampling.ignore_eos:
        raise RequestError("invalid_value", "ignore_eos goes on where the grammar ends: leave one of them out")
    logprobs = _logprobs(body)
    scores = body.prompt_logprobs, logprobs if body.echo and isinstance(body, CompletionBody) else None
    sampling = replace(
        sampling,
        min_p=body.min_p or 0.0,
        rules=rules,
        grammar=grammar,
        n=body.n or 1,
        logprobs=logprobs,
        prompt_logprobs=max((count for count in scores if count is not None), default=None),
    )
    needed = rules.looks_back or grammar is not None or sampling.prompt_logprobs is not None
    words = extra_words(sampling, prompt + sampling.max_tokens if needed else 0)
    if words > ADMISSION_ROOM:
        raise RequestError(
            "request_too_large",
            f"grammar, rules and prompt together take {4 * words} bytes on their way to the last rank, more than "
            f"{4 * ADMISSION_ROOM}: use a smaller grammar, or a shorter prompt with penalties or prompt_logprobs",
        )
    return sampling


def _token(value: int | str, key: str, limits: Limits) -> int:
    token = int(value) if isinstance(value, int) or (value.isascii() and value.isdecimal()) else -1
    if not 0 <= token < limits.vocab_size:
        raise RequestError(
            "invalid_value", f"{key} holds {brief(value)}, but token ids are from 0 to {limits.vocab_size - 1}"
        )
    return token


def _spellings(word: str, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """The token ids of `word` at the beginning of a text and within one, as vLLM bans them."""
    if tokenizer is None:
        raise RequestError("no_tokenizer", "the model has no tokenizer, so bad_words cannot be found")
    first = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
    within = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
    if not first:
        raise RequestError("invalid_value", "bad_words holds an empty string")
    return [first, within] if within[0] != first[0] and len(within) == len(first) else [first]


def _call(body: ChatBody, tokenizer: Tokenizer | None) -> str | None:
    """The grammar of a call that `tool_choice` demands, None where it leaves the choice to the model."""
    if body.tool_choice in (None, "none", "auto"):
        return None
    if not body.tools or tokenizer is None:
        raise RequestError("invalid_value", "tool_choice demands a call, but there are no tools")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise RequestError("invalid_value", f"tool_choice names {brief(name)}, which is none of the tools")
    dialect = tokenizer.chat_template(tools=True).dialect
    assert dialect is not None  # else the tools have been refused
    return call_grammar(tools, dialect, tokenizer.special_tokens.get(MARKS[dialect][0]))


def _grammar(body: Body, tokenizer: Tokenizer | None) -> str | None:
    wanted: list[tuple[str, Kind, Any]] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        wanted.append(("response_format", "json_schema", {"type": "object"}))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise RequestError("missing_parameter", "response_format.json_schema.schema is missing")
        wanted.append(("response_format", "json_schema", form.json_schema.schema_))
    said = body.structured_outputs
    if said is not None:
        if said.json_object:
            wanted.append(("structured_outputs", "json_schema", {"type": "object"}))
        for kind in ("json_schema", "regex", "choice", "grammar"):
            if getattr(said, kind) is not None:
                wanted.append(("structured_outputs", kind, getattr(said, kind)))
    guided: list[tuple[str, Kind, Any]] = [
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
    ]
    wanted += [entry for entry in guided if entry[2] is not None]
    call = _call(body, tokenizer) if isinstance(body, ChatBody) else None
    if call is not None:
        wanted.append(("tool_choice", "lark", call))
    if not wanted:
        return None
    if len(wanted) > 1:
        raise RequestError("invalid_value", f"{wanted[0][0]} and {wanted[1][0]} both say what the answer keeps to")
    _, kind, text = wanted[0]
    compact = said is not None and bool(said.disable_any_whitespace)
    return _compiled(kind, text if isinstance(text, str) else json.dumps(text), compact)


_compiled = lru_cache(CHECKED)(checked_grammar)


def _logprobs(body: Body) -> int | None:
    if isinstance(body, CompletionBody):
        return None if body.logprobs is None or body.logprobs is False else body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("invalid_value", "top_logprobs needs logprobs: true")
    return body.top_logprobs or 0 if body.logprobs else None
