"""Tool calls: how the families that we run write them, as a grammar before the answer and as a parser after it.

A chat template tells the model how to call a tool, so the template tells us which dialect to read: Hermes' (Qwen,
SmolLM), Llama 3's or Mistral's. Sources: the templates that these models ship.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

ARGUMENTS = {"hermes": "arguments", "mistral": "arguments", "llama3": "parameters"}
# What a parser looks for, the opening of a call first; some models have tokens for these that are special.
MARKS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "llama3": ("<|python_tag|>",),
}
THOUGHTS = ("<think>", "</think>")
_HERMES_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\s*\w+)?(?:\[ARGS\])?\s*(\{.*\})\s*", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What a completion says: its text, and the functions that it calls as (name, arguments as JSON text).

    `reasoning` holds the thoughts before it, None where they are not told apart; they took `reasoning_tokens`.
    `logprobs` is the API's object of that name, None where the request asks for none; so is vLLM's `prompt_logprobs`.
    """

    content: str | None
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str | None = None
    reasoning_tokens: int = 0
    logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None

    def tool_calls(self, name: str, dialect: str | None) -> list[dict[str, Any]]:
        """The calls as OpenAI's API has them, with ids that are the same in every run of the request `name`.

        Mistral's templates take ids of nine letters and digits only.
        """
        begin, length = ("", 9) if dialect == "mistral" else ("call_", 24)
        return [
            {
                "id": begin + hashlib.blake2b(f"{name}/{number}".encode()).hexdigest()[:length],
                "type": "function",
                "function": {"name": function, "arguments": arguments},
            }
            for number, (function, arguments) in enumerate(self.calls)
        ]


def dialect(template: str) -> str | None:
    """How a model with this chat `template` calls tools: a key of `ARGUMENTS`, None where it says nothing of tools."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return None if "<function=" in template else "hermes"  # XML within, which other models write
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or '"parameters"' in template:
        return "llama3"
    return None


def parse(text: str, dialect: str) -> Answer:
    """The text of a completion, special tokens included, as content and calls; all content where no call is found."""
    before, opens, rest = text.partition(MARKS[dialect][0])
    if dialect == "hermes":
        entries = [_decoded(found) for found in _HERMES_CALL.findall(text)]
    elif dialect == "mistral":  # one list of all calls or, of later models, each call behind a mark of its own
        entries = [_mistral(part) for part in rest.split(opens)] if opens else []
    else:  # several calls follow each other, apart by semicolons; the tag is left out where only JSON follows
        entries, before = (_sequence(rest), before) if opens else (_sequence(text), "")
    calls = [call for entry in entries for call in _calls(entry, ARGUMENTS[dialect])]
    if not calls or None in calls:
        return Answer(text)
    return Answer(before.strip() or None, tuple(call for call in calls if call is not None))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _mistral(text: str) -> Any:
    named = _MISTRAL_CALL.fullmatch(text)
    return {"name": named[1], "arguments": _decoded(named[2])} if named else _decoded(text)


def _decoded(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _sequence(text: str) -> list[Any]:
    """The JSON values of `text`, apart by semicolons or white space; [None] where something else is among them."""
    at, found = 0, []
    while at < len(text):
        if text[at] in "; \t\r\n":
            at += 1
            continue
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return [None]
        found.append(value)
    return found


def _calls(entry: Any, key: str) -> list[tuple[str, str] | None]:
    entries = entry if isinstance(entry, list) else [entry]
    return [_call(one, key) for one in entries]


def _call(entry: Any, key: str) -> tuple[str, str] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = entry.get(key, entry.get("arguments", {}))
    if isinstance(arguments, str):  # some models write the JSON as a string, as the API has it
        arguments = _decoded(arguments)
    return (entry["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


def grammar(tools: Sequence[dict[str, Any]], dialect: str, opening: int | None = None) -> str:
    """A Lark grammar of answers that call one of `tools`, for `tool_choice` `required` or a named function.

    `tools`: the functions that may be called: [{"type": "function", "function": {"name": ..., "parameters": ...}}].
    `opening`: the id of the token that opens a call, where the tokenizer has a special one.
    """
    calls = []
    for tool in tools:
        function = tool["function"]
        properties = {
            "name": {"const": function["name"]},
            ARGUMENTS[dialect]: function.get("parameters") or {"type": "object"},
        }
        calls.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    opens = json.dumps(MARKS[dialect][0]) if opening is None else f"<[{opening}]>"
    start = {
        "hermes": f'{opens} "\\n" call "\\n</tool_call>"',
        "mistral": f'{opens} "[" call "]"',
        "llama3": "call",
    }[dialect]
    return f"start: {start}\ncall: %json {json.dumps(call)}\n"


def split_reasoning(text: str, opened: bool) -> tuple[str | None, str]:
    """The thoughts between `<think>` and `</think>`, and the answer. `opened`: the prompt already ended with `<think>`.

    A completion that ends within its thoughts has no answer; one without thoughts (None) is all answer.
    """
    begin = re.match(r"\s*<think>", text)
    if begin is None and not opened:
        return None, text
    thoughts, _, answer = text[begin.end() if begin else 0 :].partition(THOUGHTS[1])
    return thoughts.strip("\n"), answer.lstrip("\n")
