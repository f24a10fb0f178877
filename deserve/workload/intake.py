"""From a prompt and its parameters to a request that the model can take."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deserve.batch import Request, SamplingParams
from deserve.errors import RequestError
from deserve.workload.item import Limits, ModelNames, Tokenizer
from deserve.workload.sampling import request_sampling, with_derived_seed
from deserve.workload.schema import CHAT, Body, ChatBody, CompletionBody, Message, Part, brief, check_keys, validated

# A normalizer may shorten a text before it is cut into tokens: NFC makes one syllable of three jamo.
NORMALIZED = 3


@dataclass(frozen=True)
class Intake:
    """Makes requests of one job; `defaults` hold what a request does not say itself.

    Without a `tokenizer` only prompts of token ids are taken. `names` are those of the model, None takes any. Keys that
    are not done refuse the request; where `ignored` is given, they are counted there and passed over.
    """

    tokenizer: Tokenizer | None
    limits: Limits
    defaults: SamplingParams
    names: ModelNames | None = None
    ignored: Counter[str] | None = field(default=None, compare=False)

    def request(self, custom_id: str, line: int, endpoint: str, values: dict[str, Any]) -> Request:
        """The request of an OpenAI body: `messages` at the chat endpoint, else `prompt`, text or token ids.

        A `max_tokens` that does not fit behind the prompt is cut to what does; an answer that gets there ends
        with `finish_reason` `length`. Raises RequestError where the body is no request, or leaves no room for
        a single token.
        """
        form: type[ChatBody] | type[CompletionBody] = ChatBody if endpoint == CHAT else CompletionBody
        main = "messages" if endpoint == CHAT else "prompt"
        if values.get(main) is None:
            raise RequestError("missing_parameter", f"{main} is missing")
        check_keys(form, values, form.endpoint, "", self.ignored)
        body = validated(form, values)
        self._check_model(body)
        ids = self._chat_ids(body, values["messages"]) if isinstance(body, ChatBody) else self._prompt_ids(body.prompt)
        room = self.limits.max_context - len(ids)
        if room < 1:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {len(ids)} tokens; with the answer, {self.limits.max_context} is the limit",
            )
        sampling = request_sampling(body, with_derived_seed(self.defaults, custom_id))
        unstated = body.max_tokens is None and body.max_completion_tokens is None
        default_length = unstated and sampling.max_tokens < room
        sampling = replace(
            sampling,
            max_tokens=min(sampling.max_tokens, room),
            # No more than the vocabulary to choose from: the same as no cut, and small enough for int32.
            top_k=sampling.top_k if sampling.top_k < self.limits.vocab_size else 0,
        )
        return Request(custom_id, np.array(ids, dtype=np.int32), sampling, endpoint, line, default_length)

    def _check_model(self, body: Body) -> None:
        if body.model is not None and self.names is not None and body.model not in self.names:
            raise RequestError(
                "model_not_found",
                f"model is {brief(body.model)}, but this job runs {self.names}: correct it, or set "
                "workload.model_names=any (or to the names that mean this model)",
            )

    def _chat_ids(self, body: ChatBody, values: list[dict[str, Any]]) -> list[int]:
        messages = []
        for index, (message, value) in enumerate(zip(body.messages, values, strict=True)):
            name = f"messages[{index}]"
            if value.keys() - message.model_fields_set:
                check_keys(Message, value, "a message", f"{name}.", self.ignored)
            messages.append(_for_template(message, self._text(message, f"{name}.content")))
        if not any(message["content"].strip() for message in messages):
            raise RequestError("empty_prompt", "messages hold no text")
        tokenizer = self._tokenizer_for([message["content"] for message in messages])
        return self._in_vocabulary(tokenizer.encode_chat(messages))

    def _text(self, message: Message, name: str) -> str:
        """The content of a turn in one piece, parts joined as they stand."""
        if isinstance(message.content, str):
            return message.content
        if message.content is None:  # as for OpenAI, of assistants alone
            if message.role != "assistant":
                raise RequestError("invalid_value", f"{name} is None, but must be a string or a list of parts")
            return ""
        return "".join(self._part(part, f"{name}[{index}]") for index, part in enumerate(message.content))

    def _part(self, part: Any, name: str) -> str:
        values = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(values, dict):
            raise RequestError("invalid_value", f"{name} is {brief(part)}, but must be a string or an object")
        if not isinstance(values.get("type"), str) or not values["type"].endswith("text"):
            raise RequestError(
                "unsupported_parameter", f"{name}.type is {brief(values.get('type'))}, which is not text"
            )
        check_keys(Part, values, "a part", f"{name}.", self.ignored)
        return validated(Part, values, f"{name}.").text

    def _prompt_ids(self, prompt: str | list[Any]) -> list[int]:
        if isinstance(prompt, list):
            return self._in_vocabulary(prompt)
        return self._in_vocabulary(self._tokenizer_for([prompt]).encode(prompt))

    def _tokenizer_for(self, texts: list[str]) -> Tokenizer:
        """The tokenizer, for texts that can fit: tokenizing takes 80 times the memory of a text."""
        if self.tokenizer is None:
            raise RequestError("no_tokenizer", "the model has no tokenizer: give the prompt as a list of token ids")
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        longest = NORMALIZED * self.tokenizer.longest_token
        if size > self.limits.max_context * longest:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {size} bytes, which no {self.limits.max_context} tokens can hold, the limit",
            )
        return self.tokenizer

    def _in_vocabulary(self, ids: list[Any]) -> list[int]:
        if not ids:
            raise RequestError("empty_prompt", "the prompt is empty")
        # An id outside the embedding would bring down the whole job, not just this request.
        last = self.limits.vocab_size - 1
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > last:
            ill = next(token for token in ids if type(token) is not int or not 0 <= token <= last)
            raise RequestError(
                "invalid_value",
                f"a token id of the prompt is {brief(ill)}, but must be a whole number from 0 to {last}",
            )
        return ids


def _for_template(message: Message, text: str) -> dict[str, Any]:
    """A message as chat templates know it. `developer` is OpenAI's newer name for `system`."""
    turn = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.name is not None:
        turn["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning  # the older and the newer name
    if reasoning:
        turn["reasoning_content"] = reasoning
    return turn
