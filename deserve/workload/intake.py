"""From a prompt and its parameters to a request that the model can take."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deserve.batch import AnswerForm, Request, SamplingParams
from deserve.errors import RequestError, brief
from deserve.model.tokenizer import ChatTemplate
from deserve.workload.item import Limits, ModelNames, Tokenizer
from deserve.workload.sampling import request_sampling, with_derived_seed
from deserve.workload.schema import (
    CHAT,
    Body,
    ChatBody,
    CompletionBody,
    Message,
    Part,
    check_keys,
    encodable,
    validated,
)
from deserve.workload.shaping import shaped

# A normalizer may shorten a text before it is cut into tokens: NFC makes one syllable of three jamo.
NORMALIZED = 3
# Variables of chat templates that `chat_template_kwargs` may not set: they have keys of their own, or are the job's.
STRUCTURE = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "date_parts"}


@dataclass(frozen=True)
class Intake:
    """Makes requests of one job; `defaults` hold what a request does not say itself.

    Without a `tokenizer` only prompts of token ids are taken. `names` are those of the model, None takes any. Keys that
    are not supported refuse the request; where `ignored` is given, they are counted there and passed over.
    `reasoning` is `workload.reasoning`.
    """

    tokenizer: Tokenizer | None
    limits: Limits
    defaults: SamplingParams
    names: ModelNames | None = None
    ignored: Counter[str] | None = field(default=None, compare=False)
    reasoning: str = "auto"

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
        if isinstance(body, ChatBody):
            return self._sized(custom_id, line, body, *self._chat(body, values))
        requests = []
        for number, prompt in enumerate(body.prompt):
            try:
                requests.append(self._sized(custom_id, line, body, *self._completion(body, prompt)))
            except RequestError as error:
                if len(body.prompt) == 1:
                    raise
                raise RequestError(error.code, f"prompt[{number}]: {error}") from None
        return replace(requests[0], others=tuple(requests[1:]))

    def _sized(
        self, custom_id: str, line: int, body: ChatBody | CompletionBody, ids: list[int], form: AnswerForm
    ) -> Request:
        """The request of one prompt, whose answer fits behind it."""
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
            max_tokens=1 if form.prompt_only else min(sampling.max_tokens, room),
            # No more than the vocabulary to choose from: the same as no cut, and small enough for int32.
            top_k=sampling.top_k if sampling.top_k < self.limits.vocab_size else 0,
        )
        sampling = shaped(sampling, body, len(ids), self.tokenizer, self.limits)
        prompt = np.array(ids, dtype=np.int32)
        return Request(custom_id, prompt, sampling, body.endpoint, line, default_length, form)

    def _check_model(self, body: Body) -> None:
        if body.model is not None and self.names is not None and body.model not in self.names:
            raise RequestError(
                "model_not_found",
                f"model is {brief(body.model)}, but this job runs {self.names}: correct it, or set "
                "workload.model_names=any (or to the names that mean this model)",
            )

    def _chat(self, body: ChatBody, values: dict[str, Any]) -> tuple[list[int], AnswerForm]:
        template = self._known_tokenizer.chat_template(tools=bool(body.tools))
        messages = []
        for index, (message, value) in enumerate(zip(body.messages, values["messages"], strict=True)):
            name = f"messages[{index}]"
            if value.keys() - message.model_fields_set:
                check_keys(Message, value, "a message", f"{name}.", self.ignored)
            messages.append(self._turn(message, name, template))
        if not any(message.get("content", "").strip() or "tool_calls" in message for message in messages):
            raise RequestError("empty_prompt", "messages hold no text")
        options = self._variables(body, template)
        if body.tools and self._takes(template.dialect is not None, "tools", values["tools"]):
            options["tools"] = values["tools"]
        if body.documents and self._takes("documents" in template.variables, "documents", body.documents):
            options["documents"] = body.documents
        if body.continue_final_message:
            if body.add_generation_prompt:
                raise RequestError(
                    "invalid_value", "continue_final_message and add_generation_prompt exclude each other"
                )
            options |= {"continue_final_message": True, "add_generation_prompt": False}
        elif body.add_generation_prompt is False:
            options["add_generation_prompt"] = False
        text = self._known_tokenizer.render_chat(messages, **options)
        last = messages[-1]
        form = replace(
            _form(body, last.get("content", "") if last["role"] == "assistant" else ""),
            dialect=template.dialect if "tools" in options and body.tool_choice != "none" else None,
            parallel_calls=body.parallel_tool_calls is not False,
            split_thoughts=self.reasoning == "split" or (self.reasoning == "auto" and template.thinks),
            thinking=text.rstrip().endswith("<think>"),
        )
        return self._in_vocabulary(self._encode(body, text, add_special_tokens=False)), form

    def _turn(self, message: Message, name: str, template: ChatTemplate) -> dict[str, Any]:
        """A message as chat templates know it. `developer` is OpenAI's newer name for `system`.

        Raises RequestError, naming the message by `name`, where the template would leave a part of it out.
        """
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        if message.content is not None or not message.tool_calls:
            turn["content"] = self._text(message, f"{name}.content")
        if message.name is not None:
            turn["name"] = message.name
        reasoning = message.reasoning_content or message.reasoning  # the older and the newer name
        if reasoning:
            turn["reasoning_content"] = reasoning
        if message.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        for key, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if key in turn and message.role != role:
                raise RequestError("invalid_value", f"{name}.{key} belongs to the turn of an assistant or a tool")
        if template.dialect is None and (message.role == "tool" or "tool_calls" in turn):
            key = "tool_calls" if "tool_calls" in turn else "role"
            raise RequestError(
                "unsupported_parameter",
                f"{name}.{key} is not supported: the model's chat template says nothing of tools",
            )
        return turn

    def _text(self, message: Message, name: str) -> str:
        """The content of a turn in one piece, parts joined as they stand."""
        if isinstance(message.content, str):
            return message.content
        if message.content is None:  # as for OpenAI, of assistants alone
            if message.role != "assistant":
                raise RequestError("invalid_value", f"{name} is null, but must be a string or a list of parts")
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

    def _variables(self, body: ChatBody, template: ChatTemplate) -> dict[str, Any]:
        """What the request sets of the template's variables. Raises RequestError for one that the template has not."""
        own = {"enable_thinking": body.enable_thinking, "reasoning_effort": body.reasoning_effort}
        stated = own | {
            f"chat_template_kwargs.{key}": value for key, value in (body.chat_template_kwargs or {}).items()
        }
        taken = {}
        for name, value in stated.items():
            key = name.rpartition(".")[2]
            if value is not None and self._takes(key in template.variables - STRUCTURE, name, value):
                taken[key] = value
        return taken

    def _takes(self, does: bool, name: str, value: Any) -> bool:
        """Whether the chat template `does` take the key `name`. Raises RequestError if not, or counts it as ignored."""
        if does:
            return True
        if self.ignored is None:
            raise RequestError(
                "unsupported_parameter",
                f"{name}={brief(value)} is not supported: the model's chat template does not take it; leave it out, or "
                "set workload.chat_template=FILE to one that does",
            )
        self.ignored[name] += 1
        return False

    def _completion(self, body: CompletionBody, prompt: Any) -> tuple[list[int], AnswerForm]:
        if isinstance(prompt, list):
            ids = self._in_vocabulary(prompt)
            ids = ids[-(self._at_most(body) or 0) :]
            form = _form(body, self._known_tokenizer.decode(ids) if body.echo else "")
        elif isinstance(prompt, str):
            try:
                encodable(prompt)
            except ValueError as error:
                raise RequestError("invalid_value", f"prompt {error}") from None
            ids = self._in_vocabulary(self._encode(body, prompt, add_special_tokens=True))
            form = _form(body, prompt)
        else:
            words = f"prompt is {brief(prompt)}, but must be a string, a list of token ids, or a list of these"
            raise RequestError("invalid_value", words)
        if body.max_tokens == 0 and not body.echo:
            raise RequestError("invalid_value", "max_tokens is 0, but must be at least 1, or come with echo: true")
        scored = bool(body.echo) and body.logprobs not in (None, False)
        return ids, replace(form, echo_logprobs=scored, prompt_only=body.max_tokens == 0)

    @property
    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("no_tokenizer", "the model has no tokenizer: give the prompt as a list of token ids")
        return self.tokenizer

    def _encode(self, body: Body, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that can fit: tokenizing takes 80 times the memory of a text."""
        tokenizer = self._known_tokenizer
        size = len(text) if text.isascii() else len(text.encode())
        longest = NORMALIZED * tokenizer.longest_token
        if size > self.limits.max_context * longest:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {size} bytes, which no {self.limits.max_context} tokens can hold, the limit",
            )
        stated = body.add_special_tokens
        return tokenizer.encode(text, add_special_tokens if stated is None else stated, self._at_most(body))

    def _at_most(self, body: Body) -> int | None:
        """How many tokens of the prompt are taken: -1 stands for as many as leave room for the answer."""
        if body.truncate_prompt_tokens == -1:
            return max(1, self.limits.max_context - (body.max_completion_tokens or body.max_tokens or 1))
        return body.truncate_prompt_tokens

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


def _form(body: Body, before: str) -> AnswerForm:
    """What any request may say of its answer's text; `before` is what `echo` puts before it."""
    return AnswerForm(
        show_special=body.skip_special_tokens is False,
        include_stop=bool(body.include_stop_str_in_output),
        return_token_ids=bool(body.return_token_ids),
        before=before if body.echo else "",
        prompt_logprobs=body.prompt_logprobs,
    )
