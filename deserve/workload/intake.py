"""From a prompt and its parameters to a request that the model can take."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deserve.batch import Request, SamplingParams
from deserve.errors import RequestError
from deserve.workload.checks import brief, checked_text, checked_whole
from deserve.workload.item import Limits, Tokenizer
from deserve.workload.sampling import request_sampling, with_derived_seed

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

# `developer` is OpenAI's newer name for `system`; chat templates know the older one.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Intake:
    """Makes requests of one job; `defaults` hold what a request does not say itself.

    Without a `tokenizer` only prompts of token ids are taken.
    """

    tokenizer: Tokenizer | None
    limits: Limits
    defaults: SamplingParams

    def request(self, custom_id: str, line: int, endpoint: str, body: dict[str, Any]) -> Request:
        """The request of an OpenAI `body`: `messages` at the chat endpoint, else `prompt`, text or token ids.

        A `max_tokens` that does not fit behind the prompt is cut to what does; an answer that gets there ends
        with `finish_reason` `length`. Raises RequestError where the body is no request, or leaves no room for
        a single token.
        """
        sampling = request_sampling(body, with_derived_seed(self.defaults, custom_id))
        ids = self._chat_ids(body) if endpoint == CHAT else self._prompt_ids(body)
        room = self.limits.max_context - len(ids)
        if room < 1:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {len(ids)} tokens; with the answer, {self.limits.max_context} is the limit",
            )
        sampling = replace(
            sampling,
            max_tokens=min(sampling.max_tokens, room),
            # No more than the vocabulary to choose from: the same as no cut, and small enough for int32.
            top_k=sampling.top_k if sampling.top_k < self.limits.vocab_size else 0,
        )
        return Request(custom_id, np.array(ids, dtype=np.int32), sampling, endpoint, line)

    def _chat_ids(self, body: dict[str, Any]) -> list[int]:
        messages = body.get("messages")
        if messages is None:
            raise RequestError("missing_parameter", "messages is missing")
        if not isinstance(messages, list):
            raise RequestError("invalid_value", f"messages is {brief(messages)}, but must be a list")
        checked = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
        if not any(message["content"].strip() for message in checked):
            raise RequestError("empty_prompt", "messages hold no text")
        return self._in_vocabulary(self._needed_tokenizer().encode_chat(checked))

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if prompt is None:
            raise RequestError("missing_parameter", "prompt is missing")
        if isinstance(prompt, list):
            if prompt and isinstance(prompt[0], str | list):
                raise RequestError("unsupported_parameter", "prompt holds several prompts: give each its own line")
            return self._in_vocabulary(prompt)
        return self._in_vocabulary(self._needed_tokenizer().encode(checked_text(prompt, "prompt")))

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("no_tokenizer", "the model has no tokenizer: give the prompt as a list of token ids")
        return self.tokenizer

    def _in_vocabulary(self, ids: list[Any]) -> list[int]:
        if not ids:
            raise RequestError("empty_prompt", "the prompt is empty")
        # An id outside the embedding would bring down the whole job, not just this request.
        last = self.limits.vocab_size - 1
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > last:
            for token in ids:
                checked_whole(token, "a token id of the prompt", 0, last)
        return ids


def _message(message: Any, name: str) -> dict[str, str]:
    """A chat message with its text in one piece; parts are joined as they stand."""
    if not isinstance(message, dict):
        raise RequestError("invalid_value", f"{name} is {brief(message)}, but must be an object")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise RequestError("unsupported_parameter", f"{name}.{key} is not supported")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError("invalid_value", f"{name}.role is {brief(role)}, but must be one of {', '.join(ROLES)}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RequestError("unsupported_parameter", f"{name}.content holds a part that is not text")
    return {
        "role": ROLES[role],
        "content": "".join(checked_text(part.get("text"), f"{name}.content") for part in parts),
    }
