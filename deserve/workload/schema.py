"""The keys of a request: those that are supported, those known to change nothing, and those that are refused by name.

To do a key, give it a field in one of the models and take it out of `NOT_DONE`; docs/requests.md lists all of them.
"""

import difflib
import json
import re
from collections import Counter
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deserve.batch import MOST_LOGPROBS
from deserve.errors import RequestError, brief

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SEEDS = 2**63  # a seed is in [-SEEDS, SEEDS), an int64

# Keys that change no answer of a job that runs offline and does not stream.
NO_EFFECT = {
    "user": "names the end user",
    "safety_identifier": "names the end user",
    "metadata": "labels for the provider's dashboard",
    "store": "whether the provider keeps the answer",
    "service_tier": "price and speed",
    "priority": "order of answering",
    "prediction": "expected output, to answer sooner",
    "prompt_cache_key": "prefix caching",
    "prompt_cache_retention": "prefix caching",
    "prompt_cache_options": "prefix caching",
    "cache_salt": "prefix caching",
    "request_id": "names the request in the server's log",
    "session_id": "names the conversation in the server's log",
    "stream_options": "streaming, which is refused",
    "stream_interval": "streaming, which is refused",
    "guided_decoding_backend": "which library keeps answers to a grammar",
    "return_mm_kwargs": "an endpoint that only makes prompts",
    "return_token_offsets": "an endpoint that only makes prompts",
}

# Keys that would change the answer and are not supported, with the values that ask for nothing (as null always does).
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "logprob_token_ids": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_whitespace_pattern": (),
    "repetition_detection": (),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "typical_p": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "truncation_side": ("left",),
    "suffix": ("",),
    "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    "chat_template": (),
    "reasoning": (),
    "include_reasoning": (True,),
    "thinking_token_budget": (-1,),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "routed_experts_prompt_start": (0,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "watermarking": (False,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    "extra_body": ({},),
}
# Keys of chats, which may ask for nothing at the other endpoint.
OF_CHATS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "chat_template_kwargs": ({},),
    "enable_thinking": (),
    "reasoning_effort": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
}
HINTS = {
    "extra_body": "it is an argument of OpenAI's Python client, which puts its keys into the body: do that",
    "chat_template": "give the job one, workload.chat_template=FILE",
}


def encodable(text: str) -> str:
    """Raises ValueError for a lone surrogate, which a JSON escape can hold and UTF-8 cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("holds a lone surrogate, which is no character") from None
    return text


def _whole(value: Any) -> Any:
    """16.0 as 16: tables with gaps are often exported so, and for JSON both are the same number."""
    return int(value) if type(value) is float and value.is_integer() else value


def _texts(value: str | list[str]) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, list) else (value,)
    if "" in texts:
        raise ValueError("holds an empty string, which would end every answer at once")
    return texts


def _prompts(value: Any) -> Any:
    """A prompt, or a list of them, as a list of prompts."""
    several = isinstance(value, list) and value and isinstance(value[0], str | list)
    return value if several else [value]


def _arguments(value: Any) -> Any:
    """What a function was called with: JSON text, as the API has it, as the object that templates expect."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except (ValueError, RecursionError):
        return value


def _count_or_all(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError(f"is {value}, but must be a whole number of at least 1, or -1")
    return value


Text = Annotated[str, AfterValidator(encodable)]
Whole = Annotated[int, BeforeValidator(_whole)]


class Keys(BaseModel):
    """Supported keys. A field's description says which values it takes, for error messages; null is always one."""

    model_config = ConfigDict(strict=True, extra="ignore")

    no_effect: ClassVar[dict[str, str]] = {}
    not_done: ClassVar[dict[str, tuple[Any, ...]]] = {}
    within: ClassVar[dict[str, type["Keys"]]] = {}  # of keys that hold objects, or lists of them


class Sampling(Keys):
    """How the tokens of an answer are chosen."""

    max_tokens: Annotated[Whole, Field(ge=1)] | None = Field(None, description="a whole number of at least 1")
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="a whole number of at least 1"
    )
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="a finite number of at least 0"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="a number over 0 and at most 1")
    top_k: Annotated[Whole, Field(ge=-1)] | None = Field(
        None, description="a whole number of at least 1, or 0 or -1 for all tokens"
    )
    seed: Annotated[Whole, Field(ge=-SEEDS, lt=SEEDS)] | None = Field(
        None, description=f"a whole number from {-SEEDS} to {SEEDS - 1}"
    )
    stop: Annotated[Text | list[Text], AfterValidator(_texts)] | None = Field(
        None, description="a string or a list of strings"
    )
    stop_token_ids: list[Whole] | None = Field(None, description="a list of token ids")
    ignore_eos: bool | None = Field(None, description="true or false")


class Function(Keys):
    """A function that the model may call; the chat template gets it as the line has it."""

    name: Annotated[Text, Field(min_length=1)] = Field(description="a string, not empty")
    description: Text | None = Field(None, description="a string")
    parameters: dict[str, Any] | None = Field(None, description="a JSON Schema, an object")


class Tool(Keys):
    """An entry of `tools`."""

    type: Literal["function"] = Field(description="function")
    function: Function = Field(description="an object")

    within = {"function": Function}


class Named(Keys):
    """The function of a `tool_choice`."""

    name: Text = Field(description="a string")


class NamedTool(Keys):
    """A `tool_choice` of one function."""

    type: Literal["function"]
    function: Named


class CalledFunction(Keys):
    """What an earlier answer called."""

    name: Annotated[Text, Field(min_length=1)] = Field(description="a string, not empty")
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)] = Field(
        description="a JSON object, or a string that holds one"
    )


class ToolCall(Keys):
    """A call in an earlier answer."""

    id: Text | None = Field(None, description="a string")
    type: Literal["function"] | None = Field(None, description="function")
    function: CalledFunction = Field(description="an object")

    within = {"function": CalledFunction}

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates know it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": function}


class Message(Keys):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="one of system, developer, user, assistant, tool"
    )
    content: Text | list[Any] | None = Field(None, description="a string or a list of parts")
    name: Text | None = Field(None, description="a string")
    reasoning_content: Text | None = Field(None, description="a string")
    reasoning: Text | None = Field(None, description="a string")
    tool_calls: list[ToolCall] | None = Field(None, description="a list of objects")
    tool_call_id: Text | None = Field(None, description="a string")

    no_effect = {"id": "names the message", "annotations": "the provider's notes on its answer"}
    not_done = {"function_call": (), "refusal": ("",), "audio": ()}
    within = {"tool_calls": ToolCall}


class Part(Keys):
    """A part of a turn's content; OpenAI's newer endpoint calls text by its direction."""

    type: Literal["text", "input_text", "output_text"] = Field(description="text")
    text: Text = Field(description="a string")

    no_effect = {"cache_control": "prefix caching", "annotations": "the provider's notes on its answer"}


def _one_kind(value: "Structured") -> "Structured":
    kinds = {field.alias or name: getattr(value, name) for name, field in Structured.model_fields.items()}
    del kinds["disable_any_whitespace"]
    said = [kind for kind, text in kinds.items() if text is not None]
    if len(said) != 1:
        raise ValueError(f"holds {', '.join(said) or 'none'} of {', '.join(kinds)}, but must hold one")
    if value.disable_any_whitespace and said[0] not in ("json", "json_object"):
        raise ValueError(f"has disable_any_whitespace beside {said[0]}, but it is for JSON")
    return value


class Structured(Keys):
    """What an answer must keep to, in vLLM's words."""

    json_schema: Any = Field(None, alias="json", description="a JSON schema, as an object or as text")
    json_object: Literal[True] | None = Field(None, description="true")
    regex: Text | None = Field(None, description="a string")
    choice: Annotated[list[Text], Field(min_length=1)] | None = Field(None, description="a list of strings")
    grammar: Text | None = Field(None, description="a string")
    disable_any_whitespace: bool | None = Field(None, description="true or false")

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)


class Schema(Keys):
    """The schema of a `response_format`."""

    schema_: dict[str, Any] | None = Field(None, alias="schema")

    model_config = ConfigDict(strict=True, extra="ignore")


class ResponseFormat(Keys):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


TokenId = Annotated[Whole, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Shaping(Keys):
    """What changes an answer's probabilities, and what it keeps to."""

    n: Annotated[Whole, Field(ge=1, le=128)] | None = Field(None, description="a whole number from 1 to 128")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="a number from 0 to 1")
    frequency_penalty: Penalty | None = Field(None, description="a number from -2 to 2")
    presence_penalty: Penalty | None = Field(None, description="a number from -2 to 2")
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="a number over 0"
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="an object of numbers from -100 to 100 by token id"
    )
    min_tokens: Annotated[Whole, Field(ge=0)] | None = Field(None, description="a whole number of at least 0")
    bad_words: list[Text] | None = Field(None, description="a list of strings")
    allowed_token_ids: list[TokenId] | None = Field(None, description="a list of token ids")
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(
        None, description=f"a whole number from 0 to {MOST_LOGPROBS}"
    )
    response_format: ResponseFormat | None = Field(
        None, description="an object of type text, json_object or json_schema"
    )
    structured_outputs: Annotated[Structured, AfterValidator(_one_kind)] | None = Field(
        None, description="an object with one of json, json_object, regex, choice, grammar"
    )
    guided_json: Any = Field(None, description="a JSON schema, as an object or as text")
    guided_regex: Text | None = Field(None, description="a string")
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = Field(None, description="a list of strings")
    guided_grammar: Text | None = Field(None, description="a string")


class Body(Sampling, Shaping):
    """What both endpoints take."""

    model: Text | None = Field(None, description="a string")
    skip_special_tokens: bool | None = Field(None, description="true or false")
    include_stop_str_in_output: bool | None = Field(None, description="true or false")
    return_token_ids: bool | None = Field(None, description="true or false")
    echo: bool | None = Field(None, description="true or false")
    add_special_tokens: bool | None = Field(None, description="true or false")
    truncate_prompt_tokens: Annotated[Whole, AfterValidator(_count_or_all)] | None = Field(
        None, description="a whole number of at least 1, or -1"
    )

    endpoint: ClassVar[str]
    no_effect = NO_EFFECT


class ChatBody(Body):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(description="a list of objects")
    tools: list[Tool] | None = Field(None, description="a list of objects")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="none, auto, required or an object that names a function"
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")
    enable_thinking: bool | None = Field(None, description="true or false")
    reasoning_effort: Text | None = Field(None, description="a string")
    documents: list[dict[str, Any]] | None = Field(None, description="a list of objects")
    add_generation_prompt: bool | None = Field(None, description="true or false")
    continue_final_message: bool | None = Field(None, description="true or false")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(
        None, description=f"a whole number from 0 to {MOST_LOGPROBS}"
    )

    endpoint = CHAT
    not_done = NOT_DONE
    within = {"messages": Message, "tools": Tool}


class CompletionBody(Body):
    """The body of `/v1/completions`, with a list of prompts, which are checked where the vocabulary is known."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    max_tokens: Annotated[Whole, Field(ge=0)] | None = Field(
        None, description="a whole number of at least 1, or 0 with echo"
    )
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | Literal[False] | None = Field(
        None, description=f"a whole number from 0 to {MOST_LOGPROBS}"
    )

    endpoint = COMPLETIONS
    not_done = NOT_DONE | OF_CHATS


def _decimal(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Id(Keys):
    """What names a line's result."""

    custom_id: Annotated[Text, BeforeValidator(_decimal)] = Field(description="a string or a number")


class Line(Keys):
    """A line around its body."""

    method: Any = None
    url: Any = None
    body: Any = None

    no_effect = {"metadata": "labels for the provider's dashboard"}


K = TypeVar("K", bound=Keys)


def validated(keys: type[K], values: dict[str, Any], prefix: str = "") -> K:
    """`values` as `keys`, which pass over all others.

    `prefix` says where in the line they lie. Raises RequestError, naming the first value that is wrong.
    """
    try:
        return keys.model_validate(values)
    except ValidationError as error:
        raise RequestError("invalid_value", prefix + _words(error, keys)) from None


def _words(error: ValidationError, keys: type[Keys]) -> str:
    errors = error.errors(include_url=False)
    first = next((entry for entry in errors if entry["type"] == "value_error"), errors[0])
    name, wanted, inside, holds = "", None, keys, None
    for part in first["loc"]:  # keys and indices, and among them which part of a union does not fit
        if isinstance(part, int) and holds:
            name, wanted = f"{name}[{part}]", "an object"
        elif isinstance(part, str) and part in inside.model_fields:
            name = f"{name}.{part}" if name else part
            wanted, holds = inside.model_fields[part].description, inside.within.get(part)
            inside = holds or inside
    if first["type"] == "value_error":
        return f"{name} {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{name} is missing, but must be {wanted}"
    return f"{name} is {brief(first['input'])}, but must be {wanted}"


def check_keys(keys: type[Keys], values: dict[str, Any], where: str, prefix: str, ignored: Counter[str] | None) -> None:
    """Refuse the keys of `values` that are neither done nor without effect, or count them where `ignored` is given.

    `where` says what the keys belong to, `prefix` where in the line they lie. Raises RequestError.
    """
    for key, value in values.items():
        if value is None or key in keys.model_fields or key in keys.no_effect:
            continue
        asks = keys.not_done.get(key)
        # The types are compared too: `logprobs: 0` asks for something, `logprobs: false` does not.
        if asks is not None and any(type(value) is type(other) and value == other for other in asks):
            continue
        if ignored is not None:
            ignored[re.sub(r"\[\d+\]", "[]", prefix) + key] += 1
            continue
        advice = "leave it out, or set workload.unknown_keys=ignore to answer without it"
        if asks is not None:
            raise RequestError(
                "unsupported_parameter", f"{prefix}{key}={brief(value)} is not supported: {HINTS.get(key, advice)}"
            )
        name = brief(key)[1:-1]
        near = difflib.get_close_matches(key, [*keys.model_fields, *keys.not_done, *keys.no_effect], n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise RequestError(
            "unknown_parameter", f"{prefix}{name}={brief(value)} is not a key of {where}{meant}: {advice}"
        )
