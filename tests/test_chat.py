"""Chats: what a line says reaches the template as transformers has it, and what the model writes is read back."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
from checkpoints import make_checkpoint, save_tokenizer
from launch import run_here
from openai.lib._parsing import parse_chat_completion, type_to_response_format_param
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletion
from openai.types.chat import completion_create_params as chat_params
from results import code, read_results
from transformers import AutoTokenizer

from deserve.batch import AnswerForm, Completion, Request, Rules, SamplingParams
from deserve.config import load_config
from deserve.errors import RequestError, UserError
from deserve.model.checkpoint import resolve
from deserve.model.tokenizer import Tokenizer, load_tokenizer
from deserve.model.tools import Answer
from deserve.report.results import ResultsWriter
from deserve.scheduler.sequences import Cut
from deserve.text import AnswerReader, Detokenizer, StopFinder
from deserve.workload import Rejected, open_workload
from deserve.workload.intake import Intake
from deserve.workload.item import Limits
from deserve.workload.schema import CHAT, COMPLETIONS, NO_EFFECT

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def turns(call: str = "") -> str:
    calls = "{% for c in m.tool_calls or [] %}" + call + "{% endfor %}" if call else ""
    return "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + calls + "<|end|>{% endfor %}"


# As the families' own templates write calls; the arguments must be objects
TEMPLATES = {
    "plain": turns() + ASKS,
    "hermes": TOOLS + turns("<tool_call>{{ c.function | tojson }}</tool_call>") + ASKS,
    "mistral": TOOLS + turns("[TOOL_CALLS][{{ c.function | tojson }}]{{ c.id }}{{ m.tool_call_id }}") + ASKS,
    "llama3": TOOLS + turns('<|python_tag|>{"parameters": "{{ c.function.arguments.city }}"}') + ASKS,
    "thinks": turns()
    + "{% if add_generation_prompt %}<|assistant|><think>\n"
    + "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}",
    "all": TOOLS + "{{ enable_thinking }}" + turns("<tool_call>{{ c.function | tojson }}</tool_call>") + ASKS,
    "variables": "{{ documents | length }}{{ reasoning_effort }}{{ style }}" + turns() + ASKS,
}
SPECIAL = ("[TOOL_CALLS]", "<|python_tag|>")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Weather?"}
CALLED = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
PARIS = ("weather", '{"city": "Paris"}')
CONVERSATION = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"},
]


@cache
def folder(name: str) -> Path:
    """A model folder with the tokenizer of bytes, the marks of calls among its special tokens."""
    folder = save_tokenizer(Path(mkdtemp()), TEMPLATES[name])
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for number, mark in enumerate(SPECIAL, start=261):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": number, "content": mark})
    path.write_text(json.dumps(tokenizer))
    return folder


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(folder(name))


def intake(name: str, reasoning: str = "auto", ignored: Counter[str] | None = None) -> Intake:
    return Intake(tokenizer(name), Limits(300, 2000), SamplingParams(), None, ignored, reasoning)


def chat(name: str, messages: Any = (USER,), reasoning: str = "auto", **keys: Any) -> Request:
    return intake(name, reasoning).request("a", 1, CHAT, {"messages": list(messages)} | keys)


def refusal(name: str, **keys: Any) -> str:
    with pytest.raises(RequestError) as caught:
        chat(name, **keys)
    return f"{caught.value.code}: {caught.value}"


def rendered(name: str, messages: Any, **options: Any) -> list[int]:
    """What transformers itself makes of a conversation."""
    options = {"add_generation_prompt": True} | options
    reference = AutoTokenizer.from_pretrained(folder(name))
    ids: list[int] = reference.apply_chat_template(list(messages), return_dict=False, **options)
    return ids


# Prompts


def test_a_llama_has_the_tokenizer_that_transformers_chooses(tmp_path: Path) -> None:
    (save_tokenizer(tmp_path) / "config.json").write_text(json.dumps({"model_type": "llama"}))
    made, reference = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(made._tokenizer) is type(reference)
    assert made._tokenizer.backend_tokenizer.to_str() == reference.backend_tokenizer.to_str()
    assert made.encode("Grüße <|end|>") == reference("Grüße <|end|>")["input_ids"]


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama3"])
def test_tools_reach_the_template_as_transformers_documents_them(name: str) -> None:
    call = CALLED | {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    turns = [USER, {"role": "assistant", "tool_calls": [call]}, CONVERSATION[2]]
    request = chat(name, CONVERSATION, tools=[WEATHER])
    assert request.prompt.tolist() == rendered(name, turns, tools=[WEATHER])
    assert request.form.dialect == name
    for choice in ("auto", None):
        assert chat(name, tools=[WEATHER], tool_choice=choice).form.dialect == name
    none = chat(name, tools=[WEATHER], tool_choice="none")  # as in vLLM, the model is told of them all the same
    assert none.form.dialect is None and none.prompt.tolist() == rendered(name, [USER], tools=[WEATHER])
    assert chat(name, tools=[]).form.dialect is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tool_choice": "required"}, "invalid_value: tool_choice demands a call"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "invalid_value: tool_choice is an object"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "time"}}},
            'invalid_value: tool_choice names "time"',
        ),
        ({"tools": [WEATHER], "tool_choice": "any"}, 'invalid_value: tool_choice is "any"'),
        ({"tools": [{"type": "web_search"}]}, 'invalid_value: tools[0].type is "web_search", but must be function'),
        ({"tools": [{"type": "function"}]}, "invalid_value: tools[0].function is missing"),
        ({"tools": [{"type": "function", "function": {}}]}, "invalid_value: tools[0].function.name is missing"),
        ({"tools": "weather"}, 'invalid_value: tools is "weather", but must be a list of objects'),
        (
            {"messages": [USER | {"tool_calls": [CALLED]}]},
            "invalid_value: messages[0].tool_calls belongs to the turn of an assistant",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}]},
            'invalid_value: messages[0].tool_calls[0].function.arguments is "[", but must be a JSON object',
        ),
    ],
)
def test_what_is_wrong_with_tools_is_said(keys: dict[str, Any], words: str) -> None:
    assert refusal("hermes", **keys).startswith(words)


def test_a_template_takes_what_it_knows() -> None:
    documents = [{"title": "a", "text": "b"}]
    stated = {"documents": documents, "reasoning_effort": "low", "chat_template_kwargs": {"style": "plain"}}
    ids = chat("variables", **stated).prompt.tolist()
    assert ids == rendered("variables", [USER], documents=documents, reasoning_effort="low", style="plain")
    off = chat("thinks", enable_thinking=False)
    assert off.prompt.tolist() == rendered("thinks", [USER], enable_thinking=False)
    assert off.prompt.tolist() == chat("thinks", chat_template_kwargs={"enable_thinking": False}).prompt.tolist()
    assert (off.form.thinking, chat("thinks").form.thinking) == (False, True)
    for key, value in (stated | {"enable_thinking": True, "tools": [WEATHER]}).items():
        named = "chat_template_kwargs.style" if key == "chat_template_kwargs" else key
        assert refusal("plain", **{key: value}).startswith(f"unsupported_parameter: {named}=")
    assert "chat_template_kwargs.messages" in refusal("plain", chat_template_kwargs={"messages": []})
    assert "messages[2].role" in refusal("plain", messages=[USER, USER, CONVERSATION[2]])
    ignored: Counter[str] = Counter()
    body = {"messages": [USER], "tools": [WEATHER], "enable_thinking": False}
    request = intake("plain", ignored=ignored).request("a", 1, CHAT, body)
    assert request.prompt.tolist() == rendered("plain", [USER])
    assert ignored == {"tools": 1, "enable_thinking": 1}


def test_where_the_answer_begins() -> None:
    begun = [USER, {"role": "assistant", "content": "It is"}]
    going_on = chat("plain", begun, continue_final_message=True, echo=True)
    assert going_on.prompt.tolist() == rendered(
        "plain", begun, add_generation_prompt=False, continue_final_message=True
    )
    assert going_on.form.before == "It is"
    ended = chat("plain", begun, add_generation_prompt=False, echo=False)
    assert ended.prompt.tolist() == rendered("plain", begun, add_generation_prompt=False)
    both = {"messages": begun, "continue_final_message": True, "add_generation_prompt": True}
    assert "exclude each other" in refusal("plain", **both)


def test_how_a_prompt_is_tokenized() -> None:
    def completion(prompt: Any, **keys: Any) -> list[int]:
        ids: list[int] = intake("plain").request("a", 1, COMPLETIONS, {"prompt": prompt} | keys).prompt.tolist()
        return ids

    begin, *letters = completion("abcdef")
    assert begin == 257 and completion("abcdef", add_special_tokens=False) == letters
    assert completion("abcdef", truncate_prompt_tokens=3) == [257, *letters[-2:]]  # as vLLM, special tokens stay
    assert completion([1, 2, 3], truncate_prompt_tokens=2) == [2, 3]
    assert completion("a" * 3000, truncate_prompt_tokens=-1, max_tokens=10) == [257, *letters[:1] * 1989]
    assert len(chat("plain", truncate_prompt_tokens=4).prompt) == 4
    assert chat("plain", add_special_tokens=True).prompt.tolist() == [257, *rendered("plain", [USER])]
    for keys in ({"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": -2}):
        with pytest.raises(RequestError, match="truncate_prompt_tokens"):
            completion("a", **keys)


def test_a_template_of_the_job_s_own(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    checkpoint = resolve(load_config(["model.path=" + str(make_model(tmp_path / "model"))]).model)
    own = load_tokenizer(checkpoint, chat_template=str(path))
    assert own is not None and own.render_chat([USER]) == "[Weather?]"
    path.write_text("{% for m in %}")
    with pytest.raises(UserError, match=r"workload\.chat_template=.*not a Jinja template: line 1"):
        load_tokenizer(checkpoint, chat_template=str(path))
    with pytest.raises(UserError, match=r"workload\.chat_template=.*No such file"):
        load_tokenizer(checkpoint, chat_template=str(tmp_path / "none"))
    path.write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match=r"no tokenizer"):
        load_tokenizer(resolve(load_config(["model=tiny"]).model), chat_template=str(path))


def make_model(folder: Path) -> Path:
    from checkpoints import make_checkpoint

    return save_tokenizer(make_checkpoint(folder))


# Files


def tool_of_the_client() -> dict[str, Any]:
    """A tool as OpenAI's own helper makes it of a model."""

    class Weather(pydantic.BaseModel):
        """The weather in a city."""

        city: Literal["Oslo", "Lima"]  # a random model would not end a string
        unit: Literal["C", "F"] = "C"

    return dict(openai.pydantic_function_tool(Weather))


def line(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


TWO_TURNS = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello world!"}]
UNHELPFUL = [{"role": "system", "content": "You are an unhelpful assistant."}, TWO_TURNS[1]]
# As the documents of OpenAI's and vLLM's batches have them, or those of what their lines may hold
EXAMPLES = [
    line("openai", model="gpt-3.5-turbo-0125", messages=TWO_TURNS, max_tokens=1000),
    # Both lines of vLLM's openai_example_batch.jsonl
    line("request-1", model="meta-llama/Meta-Llama-3-8B-Instruct", messages=TWO_TURNS, max_completion_tokens=1000),
    line("request-2", model="meta-llama/Meta-Llama-3-8B-Instruct", messages=UNHELPFUL, max_completion_tokens=1000),
    line("tools", model="gpt-4.1", messages=[USER], tools=[tool_of_the_client()], tool_choice="auto"),
    line("answers", model="gpt-4.1", messages=CONVERSATION, tools=[WEATHER], parallel_tool_calls=False, store=True),
    line("thinking", model="Qwen/Qwen3-8B", messages=[USER], chat_template_kwargs={"enable_thinking": False}),
    line("vllm's own", model="any", messages=[USER], top_k=20, stop_token_ids=[7], skip_special_tokens=False, seed=1),
    {
        "custom_id": "text",
        "method": "POST",
        "url": COMPLETIONS,
        "body": {"model": "any", "prompt": ["Once", "Twice"], "echo": True, "logprobs": 5, "max_tokens": 0},
    },
]


class Verdict(pydantic.BaseModel):
    """What a caller of `client.chat.completions.parse` wants to have."""

    rain: bool
    unit: Literal["C", "F"]


FORM = type_to_response_format_param(Verdict)
EXAMPLES.append(line("parsed", model="gpt-4o", messages=[USER], response_format=FORM, temperature=1.5))
EXAMPLES.append(line("called", model="gpt-4o", messages=[USER], tools=[tool_of_the_client()], tool_choice="required"))
ELSEWHERE = [
    {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "e5", "input": "You are helpful."}},
    {"custom_id": "s", "method": "POST", "url": "/v1/score", "body": {"model": "bge", "text_1": "a", "text_2": ["b"]}},
]


def test_example_files_run_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in EXAMPLES + ELSEWHERE))
    config = load_config([f"workload.source={path}", "workload.model_names=any"])
    *requests, embeddings, score = open_workload(config, tokenizer("all"), Limits(300, 2000))
    assert [item.custom_id for item in requests if isinstance(item, Request)] == [
        item["custom_id"] for item in EXAMPLES
    ]
    for item, entry in zip((embeddings, score), ELSEWHERE, strict=True):
        assert isinstance(item, Rejected)
        assert item.code == "unsupported_url" and f"{entry['url']} is not supported" in item.message


# The keys of vLLM's requests that OpenAI's client does not have, as of vLLM's main branch in November 2026
OF_VLLM = """add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params ignore_eos
    include_stop_str_in_output kv_transfer_params length_penalty logprob_token_ids min_p min_tokens priority
    prompt_logprobs repetition_detection repetition_penalty request_id response_format return_mm_kwargs return_token_ids
    return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start session_id skip_special_tokens
    spaces_between_special_tokens stop_token_ids stream stream_interval structured_outputs thinking_token_budget top_k
    truncate_prompt_tokens truncation_side use_beam_search vllm_xargs watermarking"""
OF_VLLM_CHATS = """add_generation_prompt chat_template chat_template_kwargs continue_final_message documents echo
    include_reasoning media_io_kwargs mm_processor_kwargs return_prompt_text"""
# A value of each key that asks for something, where it is not 1; and what must come with it
ASKING: dict[str, Any] = {
    "messages": [USER],
    **dict.fromkeys(("prompt", "suffix", "model", "user", "chat_template", "cache_salt", "prompt_cache_key"), "a"),
    **dict.fromkeys(("safety_identifier", "request_id", "session_id"), "a"),
    **{key: ["a"] for key in ("stop", "bad_words")},
    **{key: [5] for key in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")},
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "return_token_ids", "stream", "store"), True),
    **dict.fromkeys(("use_beam_search", "watermarking", "echo", "add_special_tokens", "return_prompt_text"), True),
    **dict.fromkeys(("return_tokens_as_token_ids", "return_token_offsets", "continue_final_message"), True),
    **dict.fromkeys(("add_generation_prompt", "include_reasoning", "parallel_tool_calls", "return_mm_kwargs"), False),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), False),
    **dict.fromkeys(("length_penalty", "top_p", "min_p"), 0.5),
    **dict.fromkeys(("reasoning_effort", "verbosity"), "low"),
    "best_of": 2,
    "chat_template_kwargs": {"style": "terse"},
    "documents": [{"text": "a"}],
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 1},
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_retention": "24h",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "stream_options": {"include_usage": True},
    "structured_outputs": {"choice": ["a"]},
    "tool_choice": "required",
    "tools": [WEATHER],
    "truncation_side": "right",
}
COMPANIONS: dict[str, dict[str, Any]] = {
    **{key: {"documents": [{"text": "b"}]} for key in ("chat_template_kwargs", "reasoning_effort")},
    "continue_final_message": {"add_generation_prompt": False},
    "tool_choice": {"tools": [WEATHER]},
    "top_logprobs": {"logprobs": True},
}
# Variables of chat templates, which this one lacks, and tools, which the other lacks
TEMPLATE_OF = dict.fromkeys(("chat_template_kwargs", "documents", "reasoning_effort"), "variables")


def documented() -> dict[str, set[str]]:
    """The keys in the first columns of the tables of docs/requests.md, by the heading above them."""
    page = (Path(__file__).parent.parent / "docs" / "requests.md").read_text()
    sections = (section.partition("\n") for section in page.split("\n## "))
    rows = {
        title: [row.split("|")[1] for row in text.splitlines() if row.startswith("| ")] for title, _, text in sections
    }
    return {title: {key for row in columns for key in re.findall(r"`(\w+)`", row)} for title, columns in rows.items()}


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_each_key_of_openai_and_vllm_becomes_what_the_documentation_says(endpoint: str) -> None:
    if endpoint == CHAT:
        main: dict[str, Any] = {"messages": [USER]}
        keys = {*chat_params.CompletionCreateParamsBase.__annotations__, *OF_VLLM.split(), *OF_VLLM_CHATS.split()}
    else:
        main = {"prompt": "a"}
        keys = {*completion_params.CompletionCreateParamsBase.__annotations__, *OF_VLLM.split(), "prompt_embeds"}
    outcomes: dict[str, str] = {}
    for key in sorted(keys):
        asking = ASKING.get(key, True if (endpoint, key) == (CHAT, "logprobs") else 1)
        try:
            request = intake(TEMPLATE_OF.get(key, "all")).request(
                "a", 1, endpoint, main | {key: asking} | COMPANIONS.get(key, {})
            )
        except RequestError as error:
            assert (error.code, str(error).split("=")[0]) == ("unsupported_parameter", key), error
            outcomes[key] = "Refused"
        else:
            outcomes[key] = "Without effect" if key in NO_EFFECT else "Supported"
            assert key not in NO_EFFECT or _same(request, intake("all").request("a", 1, endpoint, main))
    said = documented()
    assert not {key: outcome for key, outcome in outcomes.items() if key not in said[outcome]}


def _same(one: Request, other: Request) -> bool:
    parts = [(request.prompt.tolist(), request.sampling, request.form) for request in (one, other)]
    return parts[0] == parts[1]


def test_example_files_are_answered(tmp_path: Path) -> None:
    """By a whole job, and what the client's own parser reads of the answers."""
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=700)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).write_bytes((folder("all") / file).read_bytes())
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in EXAMPLES + ELSEWHERE))
    job = [f"model.path={model}", "device=cpu", f"workload.source={path}", "workload.model_names=any"]
    assert run_here(*job, f"output.dir={tmp_path}/out") == 0
    found = {entry["custom_id"]: entry for entry in read_results(tmp_path / "out")}
    assert found.keys() == {entry["custom_id"] for entry in EXAMPLES + ELSEWHERE}
    assert {name for name, entry in found.items() if code(entry) is not None} == {"e", "s"}

    def parsed(name: str, **asked: Any) -> Any:
        completion = ChatCompletion.model_validate(found[name]["response"]["body"])
        (choice,) = parse_chat_completion(chat_completion=completion, **asked).choices
        return choice.message

    verdict = parsed("parsed", response_format=Verdict, input_tools=openai.omit).parsed
    assert isinstance(verdict, Verdict)
    tool = tool_of_the_client()
    (call,) = parsed("called", response_format=openai.omit, input_tools=[tool]).tool_calls
    assert set(call.function.parsed_arguments.model_dump()) == {"city", "unit"}


def test_an_answer_put_back_is_a_message(tmp_path: Path) -> None:
    """As a client continues a conversation: with the message as it came."""
    request = chat("mistral", tools=[WEATHER])
    completion = Completion(request, np.array([1], np.int32), "stop")
    with ResultsWriter(tmp_path / "results.jsonl", True, "model") as writer:
        writer.completion(completion, Answer(None, (PARIS,), "Rain?", 3))
    (entry,) = read_results(tmp_path)
    message = ChatCompletion.model_validate(entry["response"]["body"]).choices[0].message.model_dump()
    tool = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    again = chat("mistral", [USER, message, tool], tools=[WEATHER])
    assert len(again.prompt) > len(request.prompt)


# Answers


def read(name: str, form: AnswerForm, text: str, reason: str = "stop", stop: tuple[str, ...] = ()) -> Answer:
    """What is read of a completion that says `text`, special tokens included; `stop` strings have ended it, or EOS."""
    request = Request("a", np.array([257, 65], np.int32), SamplingParams(stop=stop), CHAT, form=form)
    tokens = tokenizer(name).encode(text, add_special_tokens=False)
    cut = text[: min(text.find(end) for end in stop)] if stop else None
    ended = [256] if reason == "stop" and not stop else []
    return AnswerReader(tokenizer(name))(Completion(request, np.array(tokens + ended, np.int32), reason, cut))


BOTH = '{"name": "weather", "arguments": {"city": "Paris"}}'


@pytest.mark.parametrize("ending", ["length", "stop"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f"Well.<|user|><tool_call>\n{BOTH}\n</tool_call>"),
        ("mistral", f"Well.[TOOL_CALLS][{BOTH}]"),
        ("llama3", f"Well.<|python_tag|>{BOTH.replace('arguments', 'parameters')}"),
    ],
)
def test_calls_are_read_whether_or_not_their_marks_are_special(name: str, text: str, ending: str) -> None:
    assert read(name, AnswerForm(dialect=name), text, ending) == Answer("Well.", (PARIS,))


def test_marks_without_a_call_are_cut() -> None:
    form = AnswerForm(dialect="mistral")
    assert read("mistral", form, "a[TOOL_CALLS]b<|user|>") == Answer("ab")
    assert read("mistral", AnswerForm(dialect="mistral", show_special=True), "a[TOOL_CALLS]") == Answer("a[TOOL_CALLS]")
    assert read("mistral", form, f"[TOOL_CALLS][{BOTH}]x\n\n", stop=("\n",)).calls == ()
    assert read("mistral", form, f"[TOOL_CALLS][{BOTH}]\n", stop=("\n",)) == Answer(None, (PARIS,))


def test_only_the_first_of_parallel_calls() -> None:
    form = AnswerForm(dialect="mistral", parallel_calls=False)
    assert read("mistral", form, f"[TOOL_CALLS][{BOTH}, {BOTH}]") == Answer(None, (PARIS,))


@pytest.mark.parametrize(
    ("text", "reason", "answer"),
    [
        ("Well.\n</think>\n\nYes", "stop", Answer("Yes", (), "Well.", 14)),
        ("Well", "length", Answer("", (), "Well", 4)),
        ("</think>Yes", "stop", Answer("Yes", (), "", 8)),
        ("é</think>", "length", Answer("", (), "é", 10)),
    ],
)
def test_thoughts_are_counted(text: str, reason: str, answer: Answer) -> None:
    assert read("thinks", AnswerForm(split_thoughts=True, thinking=True), text, reason) == answer


def test_thoughts_before_calls() -> None:
    form = AnswerForm(dialect="mistral", split_thoughts=True)
    text = f"<think>Rain?</think>[TOOL_CALLS][{BOTH}]"
    assert read("mistral", form, text) == Answer(None, (PARIS,), "Rain?", len("<think>Rain?</think>"))
    assert read("mistral", form, "No thoughts") == Answer("No thoughts")


def test_who_splits_thoughts() -> None:
    assert [chat("thinks", reasoning=how).form.split_thoughts for how in ("auto", "keep", "split")] == [
        True,
        False,
        True,
    ]
    assert [chat("plain", reasoning=how).form.split_thoughts for how in ("auto", "keep", "split")] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(("whole", "content"), [(False, "ab"), (True, "abc")])
def test_stop_tokens(whole: bool, content: str) -> None:
    """They end an answer whatever stop strings there are, even one that ends with them."""
    spelt = tokenizer("plain").encode("abcd", add_special_tokens=False)
    for stop in ((), ("d", "bc")):
        sampling = SamplingParams(stop=stop, stop_token_ids=(300, spelt[2]))
        request = Request("a", np.array([257], np.int32), sampling, form=AnswerForm(include_stop=whole))
        assert StopFinder(Detokenizer(tokenizer("plain")))([request], [np.array(spelt[:3], np.int32)]) == [None]
        completion = Completion(request, np.array(spelt[:3], np.int32), "stop")
        assert AnswerReader(tokenizer("plain"))(completion).content == content
    in_ids = Completion(Request("a", np.array([1], np.int32), sampling), np.array(spelt[:3], np.int32), "stop")
    assert AnswerReader(None)(in_ids).content == " ".join(map(str, spelt[:2]))
    early = SamplingParams(stop=("b",), rules=Rules(min_tokens=2))
    request = Request("a", np.array([257], np.int32), early, form=AnswerForm(include_stop=whole))
    finder, twice = StopFinder(Detokenizer(tokenizer("plain"))), tokenizer("plain").encode("abcb", False)
    found = [finder([request], [np.array(twice[:count], np.int32)]) for count in (1, 2, 3, 4)]
    assert found == [[None], [None], [None], [Cut(4, "abc")]]
    completion = Completion(request, np.array(twice, np.int32), "stop", "abc")
    assert AnswerReader(tokenizer("plain"))(completion).content == "abc" + "b" * whole
    held_back = chat("plain", stop_token_ids=[7], min_tokens=2).sampling
    assert (held_back.stop_token_ids, held_back.rules.ends) == ((7,), (7,))
    assert "stop_token_ids" in refusal("plain", stop_token_ids=[300], min_tokens=2)


def test_what_else_a_text_shows() -> None:
    shown, whole = AnswerForm(show_special=True), AnswerForm(include_stop=True)
    assert read("plain", shown, "a<|user|>b").content == "a<|user|>b"
    assert read("plain", AnswerForm(show_special=True, include_stop=True), "a").content == "a<|end|>"
    assert read("plain", whole, "a").content == "a"
    assert read("plain", whole, "ab.c!", stop=("!", ".")).content == "ab."
    assert read("plain", AnswerForm(before="It is"), " so").content == "It is so"
    asked = Request("a", np.array([1], np.int32), form=AnswerForm(return_token_ids=True))
    alone = AnswerReader(None)(Completion(asked, np.array([5, 6], np.int32), "stop"))
    assert alone.content == "5 6"  # as without token_ids: where there is no tokenizer, tokens are the text
