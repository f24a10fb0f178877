"""Workloads: every line becomes exactly one item, and what is wrong is said."""

import gzip
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deserve.batch import AnswerForm, Request, Rules, SamplingParams
from deserve.config import Config, SamplingSection
from deserve.errors import RequestError, UserError
from deserve.model.grammar import Kind, checked_grammar
from deserve.model.tokenizer import ChatTemplate
from deserve.workload import Item, Limits, Rejected, default_sampling, open_workload, peek_lengths
from deserve.workload.batch_file import BatchFile
from deserve.workload.intake import Intake
from deserve.workload.sampling import with_derived_seed
from deserve.workload.schema import (
    CHAT,
    COMPLETIONS,
    NO_EFFECT,
    NOT_DONE,
    ChatBody,
    CompletionBody,
    Message,
    Part,
    Tool,
    ToolCall,
)
from deserve.workload.sharing import sharing

LIMITS = Limits(vocab_size=256, max_context=100)


class Bytes:
    """A tokenizer of bytes, whose chat template wants a user's turn at the end."""

    longest_token = 1
    special_tokens: ClassVar[dict[str, int]] = {}

    def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def chat_template(self, tools: bool = False) -> ChatTemplate:
        return ChatTemplate()

    def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        if messages[-1]["role"] != "user":
            raise RequestError("invalid_messages", "the last message must be the user's")
        return "".join(f"{message['role'][0]}:{message['content']};" for message in messages)


def configure(source: Path | str, path: Path | None = None, **sampling: Any) -> Config:
    config = Config()
    config.workload.source = str(source)
    config.workload.path = None if path is None else str(path)
    config.model.name = "small"
    config.sampling = SamplingSection(**({"max_tokens": 16} | sampling))
    return config


def read(config: Config) -> list[Item]:
    return list(open_workload(config, Bytes(), LIMITS))


def read_lines(folder: Path, *lines: Any, **sampling: Any) -> list[Item]:
    path = folder / "in.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read(configure(path, **sampling))


def request(item: Item) -> Request:
    assert isinstance(item, Request), item
    return item


def rejected(item: Item, code: str, *words: str) -> Rejected:
    assert isinstance(item, Rejected), item
    assert item.code == code, item
    assert all(word in item.message for word in words), item
    return item


def text(item: Item) -> str:
    return bytes(request(item).prompt.tolist()).decode()


# Synthetic


def test_fixed_is_deterministic_and_within_its_bounds() -> None:
    config = configure("fixed200:20:5")
    first, again = ([request(item) for item in open_workload(config, None, LIMITS)] for _ in range(2))
    assert [item.custom_id for item in first] == [f"fixed-{index}" for index in range(200)]
    assert all(np.array_equal(one.prompt, other.prompt) for one, other in zip(first, again, strict=True))
    assert {len(item.prompt) for item in first} == set(range(15, 26))
    ids = np.concatenate([item.prompt for item in first])
    assert ids.dtype == np.int32 and ids.min() == 0 and ids.max() == 255
    assert {item.endpoint for item in first} == {COMPLETIONS}
    assert peek_lengths(config, None, LIMITS) == peek_lengths(config, None, LIMITS, sample=1)
    lengths = peek_lengths(config, None, LIMITS)
    assert (lengths.count, lengths.mean_prompt, lengths.max_total) == (200, 20, 41)
    config.workload.limit = 3
    assert len(list(open_workload(config, None, LIMITS))) == 3
    assert peek_lengths(config, None, LIMITS).count == 3


@pytest.mark.parametrize(
    "source", ["fixed", "fixed8:4", "fixed8:4:-1", "fixed0:4:0", "fixed8:4:4", "fixed8:4:0x", "/data/none"]
)
def test_malformed_fixed(source: str) -> None:
    with pytest.raises(UserError, match=r"workload\.source"):
        open_workload(configure(source), None, LIMITS)


def test_fixed_beyond_the_context_fails_at_open() -> None:
    open_workload(configure("fixed8:80:4"), None, LIMITS)
    with pytest.raises(UserError, match=r"workload\.source.*85.*max_tokens=16.*100"):
        open_workload(configure("fixed8:80:5"), None, LIMITS)


def test_unknown_source() -> None:
    with pytest.raises(UserError, match=r"workload\.source=squad is no file"):
        open_workload(configure("squad"), Bytes(), LIMITS)


# JSONL


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "user": "me"}
    items = read_lines(
        tmp_path,
        {"custom_id": "a", "method": "POST", "url": CHAT, "body": body},
        {"custom_id": "b", "url": COMPLETIONS, "body": {"prompt": "once", "max_completion_tokens": 8}},
        "",
        {"prompt": [1, 2, 255], "custom_id": "c", "temperature": 1},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be "}] * 2}, *body["messages"]]},
        "   \t",
        {"prompt": "é"},
    )
    assert [item.custom_id for item in items] == ["a", "b", "c", "line-5", "line-7"]
    assert [item.line for item in items] == [1, 2, 4, 5, 7]
    endpoints = [CHAT, COMPLETIONS, COMPLETIONS, CHAT, COMPLETIONS]
    assert [request(item).endpoint for item in items] == endpoints
    assert [text(items[0]), text(items[1]), text(items[3])] == ["u:hi;", "once", "s:be be ;u:hi;"]
    assert [request(item).sampling.max_tokens for item in items] == [7, 8, 16, 16, 16]
    assert request(items[2]).prompt.tolist() == [1, 2, 255] and request(items[2]).sampling.temperature == 1


def test_what_only_python_reads_is_refused_under_the_line_s_own_name(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"custom_id": "nan", "prompt": "a", "temperature": NaN}\n'
        '{"custom_id": "twice", "prompt": "a", "seed": 1, "seed": 2}\n'
        '{"custom_id": "long", "prompt": "a", "seed": ' + "9" * 5000 + "}\n"
        '{"custom_id": "inside", "messages": [{"role": "user", "content": "a", "content": "b"}]}\n'
        '{"custom_id": "none", "url": null, "body": null, "method": true}\n'
    )
    items = read(configure(path))
    assert [(item.custom_id, item.code) for item in items[:4] if isinstance(item, Rejected)] == [
        (name, "invalid_json") for name in ("nan", "twice", "long", "inside")
    ]
    messages = [item.message for item in items if isinstance(item, Rejected)]
    assert "NaN is not a JSON value" in messages[0] and 'key "seed" twice' in messages[1]
    assert "thousands of digits" in messages[2] and 'key "content" twice' in messages[3]
    assert "method is true" in messages[4]


def test_the_demonstration_s_model_has_its_name_on_the_hub(tmp_path: Path) -> None:
    config = configure(tmp_path / "in.jsonl")
    config.model.name = "smollm2-135m"
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "model": "HuggingFaceTB/SmolLM2-135M-Instruct"}\n')
    assert isinstance(read(config)[0], Request)


def test_byte_order_mark_and_no_final_newline(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [text(item) for item in read(configure(tmp_path / "in.jsonl"))] == ["a", "b"]


def test_a_request_wins_over_the_job(tmp_path: Path) -> None:
    said = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": -2, "stop": "x", "ignore_eos": True}
    job: dict[str, Any] = {"temperature": 2.0, "top_p": 0.5, "top_k": 3, "stop": ["y", "z"]}
    own, plain, nulls, none = (
        request(item).sampling
        for item in read_lines(
            tmp_path,
            {"prompt": "a"} | said,
            {"prompt": "a"},
            {"prompt": "a"} | dict.fromkeys(said),
            {"prompt": "a", "stop": [], "top_k": 10**30, "temperature": 1e-9},
            **job,
        )
    )
    assert own == SamplingParams(16, 0.5, 0.9, 5, 2**63 - 2, ("x",), True)
    for params in plain, nulls:
        assert params == SamplingParams(16, 2.0, 0.5, 3, params.seed, ("y", "z"), False)
    # As many tokens as there are cut nothing off; a temperature that underflows is greedy.
    assert (none.stop, none.top_k, none.temperature) == ((), 0, 0.0)
    assert len({own.seed, plain.seed, nulls.seed, none.seed}) == 4
    (again,) = read_lines(tmp_path, {"prompt": "a", "custom_id": "line-2"}, **job)
    (other,) = read_lines(tmp_path, {"prompt": "a", "custom_id": "line-2"}, seed=1, **job)
    assert request(again).sampling.seed == plain.seed != request(other).sampling.seed


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        ("{", "invalid_json", "not JSON"),
        ('{"prompt": NaN}', "invalid_json", "NaN"),
        ("[" * 100_000, "invalid_json", "deeply"),
        ('{"max_tokens": ' + "9" * 5000 + "}", "invalid_json", "digits"),
        ('{"max_tokens": ' + "9" * 5000 + " !", "invalid_json", "delimiter"),
        ("[1]", "invalid_request", "a list"),
        ("7", "invalid_request", "7"),
        ({}, "missing_parameter", "messages and prompt"),
        ({"prompt": "a", "messages": []}, "missing_parameter", "one of"),
        ({"url": "/v1/embeddings", "body": {"input": "a"}}, "unsupported_url", "/v1/embeddings is not supported"),
        ({"url": "/v1/score", "body": {"text_1": "a"}}, "unsupported_url", "/v1/score is not supported"),
        ({"url": "/v1/chat", "body": {}}, "invalid_url", "/v1/chat"),
        ({"url": [], "body": {}}, "invalid_url", "a list"),
        ({"body": {"max_tokens": 1}}, "missing_parameter", "messages and prompt"),
        ({"url": CHAT, "method": "GET", "body": {}}, "invalid_method", "GET"),
        ({"url": CHAT, "method": "POST"}, "invalid_request", "body"),
        ({"url": CHAT, "body": {"prompt": "a"}}, "missing_parameter", "messages"),
        ({"url": COMPLETIONS, "body": {}}, "missing_parameter", "prompt"),
        ({"prompt": ""}, "empty_prompt", "empty"),
        ({"prompt": []}, "empty_prompt", "empty"),
        ({"messages": []}, "empty_prompt", "no text"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty_prompt", "no text"),
        ({"messages": "hi"}, "invalid_value", "list"),
        ({"messages": ["hi"]}, "invalid_value", "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "invalid_value", "role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "unsupported_parameter", "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "invalid_value", 'messages[0].role is "robot"'),
        ({"messages": [{"role": "user"}]}, "invalid_value", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_parameter", "text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "content[0].text"),
        ({"messages": [{"role": "user", "content": ["hi", 5]}]}, "invalid_value", "content[1] is 5"),
        ('{"messages": [{"role": "user", "content": ["\\ud800"]}]}', "invalid_value", "content[0].text holds a lone"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "invalid_messages", "user"),
        ({"prompt": 3}, "invalid_value", "prompt"),
        ({"prompt": ["a", 3]}, "invalid_value", "prompt[1]: prompt is 3"),
        ({"prompt": ["a", ""]}, "empty_prompt", "prompt[1]: the prompt is empty"),
        ({"prompt": ["a", "b" * 100]}, "context_length_exceeded", "prompt[1]: the prompt has 100 tokens"),
        ({"prompt": [[1], [256]]}, "invalid_value", "prompt[1]: a token id of the prompt is 256"),
        ({"prompt": "a", "prompt_logprobs": -1}, "invalid_value", "prompt_logprobs is -1"),
        ({"prompt": [1, 256]}, "invalid_value", "256"),
        ({"prompt": [-1]}, "invalid_value", "-1"),
        ({"prompt": [True]}, "invalid_value", "is true"),
        ('{"prompt": "\\ud800"}', "invalid_value", "surrogate"),
        ({"prompt": "a", "max_tokens": -4}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "max_completion_tokens": "4"}, "invalid_value", "max_completion_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "invalid_value", "temperature"),
        ('{"prompt": "a", "temperature": 1e999}', "invalid_value", "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "invalid_value", "temperature"),
        ({"prompt": "a", "temperature": True}, "invalid_value", "temperature"),
        ({"prompt": "a", "top_p": 0}, "invalid_value", "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "invalid_value", "top_p"),
        ({"prompt": "a", "top_k": -2}, "invalid_value", "top_k"),
        ({"prompt": "a", "seed": 2**63}, "invalid_value", "seed"),
        ({"prompt": "a", "stop": [1]}, "invalid_value", "stop"),
        ({"prompt": "a", "stop": ""}, "invalid_value", "stop"),
        ({"prompt": "a", "ignore_eos": 1}, "invalid_value", "ignore_eos"),
        ({"prompt": "a", "best_of": 2}, "unsupported_parameter", "best_of=2"),
        ({"prompt": "a", "n": 0}, "invalid_value", "n is 0"),
        ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs is 21"),
        ({"prompt": "a", "logprobs": True}, "invalid_value", "logprobs is true"),
        ({"messages": [{"role": "user", "content": "c"}], "top_logprobs": 2}, "invalid_value", "logprobs: true"),
        ({"prompt": "a", "presence_penalty": 3}, "invalid_value", "presence_penalty is 3"),
        ({"prompt": "a", "logit_bias": {"300": 1}}, "invalid_value", 'logit_bias holds "300"'),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "invalid_value", 'logit_bias holds "-1"'),
        ({"prompt": "a", "allowed_token_ids": [257]}, "invalid_value", "allowed_token_ids holds 257"),
        ({"prompt": "a", "allowed_token_ids": []}, "invalid_value", "allowed_token_ids is empty"),
        ({"prompt": "a", "bad_words": [""]}, "invalid_value", "bad_words"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "invalid_value", "min_tokens is 9"),
        ({"prompt": "a", "guided_regex": "("}, "invalid_grammar", "regex"),
        ({"prompt": "a", "guided_regex": "a", "guided_json": {}}, "invalid_value", "guided_regex"),
        ({"prompt": "a", "guided_regex": "a", "ignore_eos": True}, "invalid_value", "ignore_eos"),
        ({"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}}, "invalid_value", "json, regex"),
        ({"prompt": "a", "structured_outputs": {}}, "invalid_value", "none of json"),
        ({"prompt": "a", "structured_outputs": {"disable_any_whitespace": True}}, "invalid_value", "none of json"),
        (
            {"prompt": "a", "structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "invalid_value",
            "disable_any_whitespace beside regex",
        ),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "missing_parameter", "schema is missing"),
        ({"prompt": "a", "guided_json": "x" * 2**21}, "invalid_grammar", "json_schema"),
        ({"prompt": "a", "stream": True}, "unsupported_parameter", "stream"),
        ({"prompt": "a", "tools": [{}]}, "unsupported_parameter", "tools"),
        ({"prompt": "a", "custom_id": [7]}, "invalid_value", "custom_id"),
        ({"prompt": "a", "custom_id": True}, "invalid_value", "custom_id"),
        ({"prompt": "a", "custom_id": ""}, "invalid_value", "custom_id"),
        ('{"prompt": "a", "custom_id": "\\udfff"}', "invalid_value", "custom_id"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, line: Any, code: str, word: str) -> None:
    first, second = read_lines(tmp_path, "", line, {"prompt": "fine"})
    assert rejected(first, code, "line 2: ", word).custom_id == "line-2"
    assert text(second) == "fine"


def test_harmless_values_of_unsupported_parameters(tmp_path: Path) -> None:
    harmless = {"n": 1, "stream": False, "logprobs": None, "tools": [], "presence_penalty": 0.0, "min_p": 0}
    assert text(*read_lines(tmp_path, {"prompt": "a"} | harmless)) == "a"


def keeps_to(kind: Kind, text: str, compact: bool = False) -> SamplingParams:
    return SamplingParams(grammar=checked_grammar(kind, text, compact))


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"n": 3, "min_p": 0.1}, SamplingParams(n=3, min_p=0.1)),
        ({"logprobs": 5}, SamplingParams(logprobs=5)),
        ({"logprobs": 0}, SamplingParams(logprobs=0)),
        ({"logprobs": False}, SamplingParams()),
        ({"frequency_penalty": 1, "presence_penalty": -1.5}, Rules(frequency_penalty=1.0, presence_penalty=-1.5)),
        ({"repetition_penalty": 1.2, "min_tokens": 3}, Rules(repetition_penalty=1.2, min_tokens=3)),
        ({"logit_bias": {"7": -100, "12": 3.5}}, Rules(bias=((7, -100.0), (12, 3.5)))),
        ({"allowed_token_ids": [4, 5], "bad_words": ["ab"]}, Rules(allowed=(4, 5), banned=((97, 98),))),
        ({"guided_choice": ["a", "b"]}, keeps_to("choice", '["a", "b"]')),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            keeps_to("choice", '["a", "b"]'),
        ),
        (
            {"structured_outputs": {"json": {"enum": [5]}}},
            keeps_to("json_schema", '{"enum": [5]}'),
        ),
        (
            {"structured_outputs": {"json": {"enum": [5]}, "disable_any_whitespace": True}},
            keeps_to("json_schema", '{"enum": [5]}', compact=True),
        ),
        ({"guided_json": '{"enum": [5]}'}, keeps_to("json_schema", '{"enum": [5]}')),
        (
            {"response_format": {"type": "json_object"}},
            keeps_to("json_schema", '{"type": "object"}'),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [5]}}}},
            keeps_to("json_schema", '{"enum": [5]}'),
        ),
        ({"response_format": {"type": "text"}}, SamplingParams()),
    ],
)
def test_what_shapes_an_answer(tmp_path: Path, said: Any, wanted: SamplingParams | Rules) -> None:
    (item,) = read_lines(tmp_path, {"prompt": "a", "max_tokens": 16, "seed": 5} | said)
    assert isinstance(item, Request), item
    sampling = replace(item.sampling, seed=0, max_tokens=256)
    assert sampling == (SamplingParams(rules=wanted) if isinstance(wanted, Rules) else wanted)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (
            {"prompt": "a", "temprature": 0},
            "unknown_parameter",
            ("temprature=0", "did you mean temperature", "leave it"),
        ),
        ({"prompt": "a", "answer": "b"}, "unknown_parameter", ('answer="b"', COMPLETIONS, "unknown_keys=ignore")),
        ({"prompt": "a", "extra_body": {"top_k": 1}}, "unsupported_parameter", ("extra_body", "client")),
        ({"url": CHAT, "body": {"messages": [], "prompt": "a"}}, "unknown_parameter", ('prompt="a"', CHAT)),
        ({"url": CHAT, "max_tokens": 5, "body": {"messages": []}}, "unknown_parameter", ("max_tokens=5", "beside")),
        *(
            ({"messages": [{"role": "user", "content": "hi"}], key: value}, "unsupported_parameter", (key,))
            for key, value in {
                "chat_template_kwargs": {"enable_thinking": False},
                "enable_thinking": False,
                "reasoning_effort": "low",
                "documents": [{"text": "a"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            }.items()
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "image": "b"}]}]},
            "unknown_parameter",
            ('messages[0].content[0].image="b"', "a part"),
        ),
        (
            {"messages": [{"role": "user", "content": "hi", "tool_call": 1}]},
            "unknown_parameter",
            ("messages[0].tool_c",),
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            "unsupported_parameter",
            ("messages[0].tool_calls", "says nothing of tools"),
        ),
    ],
)
def test_a_key_that_is_not_done_is_named(tmp_path: Path, line: Any, code: str, words: tuple[str, ...]) -> None:
    first, second = read_lines(tmp_path, "", {"custom_id": "a"} | line, {"prompt": "fine"})
    assert rejected(first, code, "line 2: ", *words).custom_id == "a"
    assert text(second) == "fine"


def test_keys_that_change_nothing(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} | dict.fromkeys(NO_EFFECT, 1)
    for key, (neutral, *_) in ((key, values) for key, values in NOT_DONE.items() if values):
        body[key] = neutral
    line = {"url": CHAT, "metadata": {"a": "b"}, "body": body | {"add_special_tokens": False, "temprature": None}}
    assert text(*read_lines(tmp_path, line)) == "u:hi;"


def test_ignored_keys_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "a", "best_of": 2, "answer": 1}\n'
        '{"url": "/v1/completions", "x": 1, "body": {"prompt": "b", "best_of": 3}}\n'
        '{"messages": [{"role": "user", "content": "c", "audio": [1]}], "enable_thinking": true}\n{"prompt": 5}\n'
    )
    config = configure(path)
    config.workload.unknown_keys = "ignore"
    ignored: Counter[str] = Counter()
    *items, ill = open_workload(config, Bytes(), LIMITS, ignored=ignored)
    assert [text(item) for item in items] == ["a", "b", "u:c;"]
    rejected(ill, "invalid_value", "prompt")
    assert ignored == {"best_of": 2, "answer": 1, "x": 1, "messages[].audio": 1, "enable_thinking": 1}


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "requests.md").read_text()
    models = (ChatBody, CompletionBody, Message, Part, Tool, ToolCall)
    keys = {key for model in models for key in (*model.model_fields, *model.not_done, *model.no_effect)}
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]


def test_a_request_for_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-7B"
    folder.mkdir()
    names = ["small", "org/small", "gpt-4o", "Llama-7B", str(folder), "meta/Llama-7B", "meta/llama-8b"]
    path = tmp_path / "in.jsonl"
    path.write_text(json_lines([{"prompt": "a", "model": name} for name in names]))

    def accepted(model_names: Any, model_path: str | None) -> list[str]:
        config = configure(path)
        config.workload.model_names, config.model.path = model_names, model_path
        items = list(open_workload(config, Bytes(), LIMITS))
        for item in items:
            if isinstance(item, Rejected):
                rejected(item, "model_not_found", 'model is "', "runs small", "workload.model_names=any")
        return [name for name, item in zip(names, items, strict=True) if isinstance(item, Request)]

    assert accepted("auto", None) == ["small"]
    assert accepted("auto", "org/small") == ["small", "org/small"]
    assert accepted("auto", str(folder)) == ["small", "Llama-7B", str(folder), "meta/Llama-7B"]
    assert accepted(["gpt-4o"], None) == ["small", "gpt-4o"]
    assert accepted("any", None) == names


def test_values_of_other_programs_files(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    turns = [
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "assistant"},
        {"role": "user", "content": ["a", {"type": "input_text", "text": "b"}], "name": "Ann"},
    ]
    items = read_lines(
        tmp_path,
        {"custom_id": 7, "body": chat | {"max_tokens": 8.0, "top_k": -1, "stop": None, "seed": -1}},
        {"custom_id": 7.5, "url": "/chat/completions", "body": chat | {"tools": None}},
        {"custom_id": "7", "prompt": "a"},
        {"prompt": ["one"]},
        {"prompt": [[1, 2]], "custom_id": "line-4"},
        {"messages": turns},
        {"prompt": "a", "top_k": -1},
        {"prompt": ["ab", "c"], "echo": True, "max_tokens": 0, "logprobs": 2, "prompt_logprobs": 1},
        top_k=3,
    )
    assert [item.custom_id for item in items] == ["7", "7.5", *(f"line-{number}" for number in range(3, 9))]
    sampling = request(items[0]).sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.stop) == (8, 0, ())
    assert sampling.seed == with_derived_seed(SamplingParams(), "7").seed
    rejected(items[2], "duplicate_custom_id", "line 1")
    assert text(items[3]) == "one" and request(items[1]).endpoint == CHAT
    rejected(items[4], "duplicate_custom_id", "line 4")
    assert text(items[5]) == "a:;a:;u:ab;"
    assert request(items[6]).sampling.top_k == 0
    first, (second,) = request(items[7]), request(items[7]).others
    assert (text(first), text(second)) == ("ab", "c") and first.sampling == second.sampling
    assert (first.sampling.max_tokens, first.sampling.prompt_logprobs) == (1, 2)
    assert second.form == AnswerForm(before="c", echo_logprobs=True, prompt_logprobs=1, prompt_only=True)
    assert peek_lengths(configure(tmp_path / "in.jsonl"), Bytes(), LIMITS).answers == 7 / 6


@pytest.mark.parametrize(
    ("key", "whose"),
    [("params", "Anthropic"), ("request", "Gemini"), ("modelInput", "Bedrock"), ("response", "results")],
)
def test_a_line_made_for_another_program(tmp_path: Path, key: str, whose: str) -> None:
    (item,) = read_lines(tmp_path, {"custom_id": "a", key: {"messages": []}})
    assert rejected(item, "invalid_request", "line 1: ", key, whose, '"body"').custom_id == "a"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_a_file_that_is_not_utf8(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes('{"prompt": "a"}\n'.encode(encoding))
    for opened in (open_workload, peek_lengths):
        with pytest.raises(UserError, match=r"workload\.source=.*in\.jsonl is in UTF-(16|32).*iconv -f UTF"):
            opened(configure(path), Bytes(), LIMITS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "compressed with gzip.*gunzip"),
        (b"PAR1....", "a Parquet file"),
        (b'[\n  {"prompt": "a"}\n]', r"a JSON array.*jq -c '\.\[\]'"),
        (b'[{"prompt": "a"},\n {"prompt": "b"}]', "a JSON array"),
        (b'\xef\xbb\xbf["' + b"a" * 100_000 + b'"]', "a JSON array"),
        (b'{"prompt":\n  "a"}', r"spread over lines.*jq -c"),
        (b'{"prompt": "a"},\r\n\r\n{"prompt": "b"},\r\n', "a comma behind each line.*sed"),
        (b"prompt,max_tokens\nOnce upon a time,5\n", r"a table with commas \(CSV\?\).*read_csv"),
        (b"id\tprompt\n1\tOnce\n", "a table with tabs"),
        (b"Once upon a time", r"plain text.*jq -Rc '\{prompt: \.\}'"),
        (b'{\n  "prompt": "a"\n}', r"spread over lines.*jq -c"),
    ],
)
def test_a_file_that_is_not_of_lines(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        open_workload(configure(path), Bytes(), LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b'oops\n{"prompt": "a"}',
        b'{"prompt": "a"}\noops\n',
        b'[1]\n{"prompt": "a"}',
        b"\n",
        b'{"prompt": "' + b"a" * 100_000 + b'"}\noops',
    ],
)
def test_a_file_of_which_a_line_is_wrong_is_read(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    assert len(read(configure(path))) == len([line for line in data.split(b"\n") if line])


def test_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    fitting = json.dumps({"prompt": "a" * 985}).encode()
    assert len(fitting) == 1000 - 1
    path.write_bytes(b"x" * 2_500_000 + b"\n" + fitting + b" \n" + fitting + b"  \n" + fitting + b" ")
    config = configure(path)
    config.workload.max_line_mb = 0.001
    items = read(config)
    assert [item.line for item in items] == [1, 2, 3, 4]
    for item in (items[0], items[2]):
        rejected(item, "line_too_long", f"line {item.line}: ", "workload.max_line_mb=0.001")
    for item in (items[1], items[3]):
        rejected(item, "context_length_exceeded")
    assert peek_lengths(config, Bytes(), LIMITS).count == 4


def test_a_text_that_no_context_holds_is_not_tokenized(tmp_path: Path) -> None:
    class Never(Bytes):
        def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
            raise AssertionError

    path = tmp_path / "in.jsonl"
    path.write_text(json_lines([{"prompt": "é" * 151}, {"messages": [{"role": "user", "content": "x" * 301}]}]))
    for item in open_workload(configure(path), Never(), LIMITS):
        rejected(item, "context_length_exceeded", "30", "bytes", "100")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "\xff"}\n{"prompt": "b"}\n')
    first, second = read(configure(tmp_path / "in.jsonl"))
    rejected(first, "invalid_utf8", "line 1", "byte 13")
    assert text(second) == "b"


def test_custom_ids_are_unique(tmp_path: Path) -> None:
    items = read_lines(
        tmp_path,
        {"custom_id": "a", "prompt": ""},  # an id is taken even by a line that is no request
        {"custom_id": "a", "prompt": "x"},
        {"custom_id": "line-4", "prompt": "x"},
        {"prompt": "x"},
        {"custom_id": "line-2", "prompt": "x"},
    )
    assert [item.custom_id for item in items] == ["a", "line-2", "line-4", "line-4'", "line-5"]
    rejected(items[1], "duplicate_custom_id", "line 2", '"a"', "line 1")
    rejected(items[4], "duplicate_custom_id", "line 5", "line 2")


def test_context(tmp_path: Path) -> None:
    lines = [{"prompt": "a" * length} for length in (84, 85, 99, 100)]
    *fitting, over = read_lines(tmp_path, *lines)
    assert [request(item).sampling.max_tokens for item in fitting] == [16, 15, 1]
    rejected(over, "context_length_exceeded", "line 4", "100")


def test_whose_length_is_the_default(tmp_path: Path) -> None:
    stated = {"max_tokens": 16}
    lines = [{"prompt": "a"}, {"prompt": "a"} | stated, {"prompt": "a" * 84}, {"prompt": "a", "max_tokens": None}]
    assert [request(item).default_length for item in read_lines(tmp_path, *lines)] == [True, False, False, True]


def test_to_the_end_of_the_context(tmp_path: Path) -> None:
    lines = [{"prompt": "a" * 30}, {"prompt": "a", "max_tokens": 5}, {"prompt": "a" * 99}]
    items = [request(item) for item in read_lines(tmp_path, *lines, max_tokens=None)]
    assert [item.sampling.max_tokens for item in items] == [70, 5, 1]
    assert not any(item.default_length for item in items)
    lengths = peek_lengths(configure(tmp_path / "in.jsonl", max_tokens=None), Bytes(), LIMITS)
    assert (lengths.sizes, lengths.max_total) == (((30, 70), (1, 5), (99, 1)), 100)
    config = configure("fixed9:60:30", max_tokens=None)
    assert {len(item.prompt) + request(item).sampling.max_tokens for item in open_workload(config, None, LIMITS)} == {
        100
    }
    lengths = peek_lengths(config, None, LIMITS)
    assert (lengths.mean_output, lengths.max_total) == (40, 100)
    with pytest.raises(UserError, match=r"up to 100 tokens; with sampling\.max_tokens=null"):
        open_workload(configure("fixed9:60:40", max_tokens=None), None, LIMITS)


def test_limit_and_laziness(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' * 1000)
    config = configure(path)
    config.workload.limit = 4
    assert len(read(config)) == 4
    assert peek_lengths(config, Bytes(), LIMITS).count == 4


def test_missing_file_and_missing_tokenizer(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"workload\.source"):
            open_workload(configure(f"{path}" if path.suffix else f"{path}/x.jsonl"), Bytes(), LIMITS)
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(UserError, match=r"workload\.source=.*folder\.jsonl cannot be read: Is a directory"):
        open_workload(configure(folder), Bytes(), LIMITS)
    with pytest.raises(UserError, match="no tokenizer"):
        open_workload(configure("sharegpt", tmp_path / "any"), None, LIMITS)


def test_without_a_tokenizer_prompts_are_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "text"}\n{"prompt": [3, 1, 2]}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    text, ids, chat = open_workload(configure(path), None, LIMITS)
    rejected(text, "no_tokenizer", "line 1", "token ids")
    assert request(ids).prompt.tolist() == [3, 1, 2]
    rejected(chat, "no_tokenizer", "line 3")


def test_what_no_request_can_survive_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    config = configure(path)
    path.write_text('{"prompt": "a", "model": "gpt-4o"}\n{"prompt": "b", "model": "gpt-5"}\n')
    with pytest.raises(
        UserError, match=r"in\.jsonl: none of the 2 .*line 1: model is .gpt-4o..* runs small.*model_names"
    ):
        peek_lengths(config, Bytes(), LIMITS)
    path.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(UserError, match=r"in\.jsonl: none of the 2 .*line 1: the model has no tokenizer.*token ids"):
        peek_lengths(config, None, LIMITS)
    path.write_text('{"prompt": "a"}\n{"prompt": [1]}\n')
    assert peek_lengths(config, None, LIMITS).count == 2


def test_peek_spreads_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [{"prompt": "a" * 10}] * 60 + [{"prompt": "a" * 70, "max_tokens": 20}] * 60 + [{}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    lengths = peek_lengths(configure(path), Bytes(), LIMITS, sample=10)
    assert (lengths.count, lengths.max_total) == (121, 90)
    assert 30 < lengths.mean_prompt < 50 and 17 < lengths.mean_output < 19
    path.write_text("{}\n")
    lengths = peek_lengths(configure(path), Bytes(), LIMITS)
    assert (lengths.count, lengths.mean_prompt, lengths.mean_output) == (1, 1, 16)


def test_peek_knows_every_request_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "abc", "max_tokens": 5}\n{"prompt": "a", "max_tokens": 9}\n')
    lengths = peek_lengths(configure(path), Bytes(), LIMITS)
    assert lengths.sizes == ((3, 5), (1, 9)) and not lengths.exact
    assert peek_lengths(configure(path, ignore_eos=True), Bytes(), LIMITS).exact
    assert not peek_lengths(configure(path), Bytes(), LIMITS, sample=1).sizes


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9).map(np.int32), min_size=1, max_size=12))
def test_what_prompts_share(prompts: list[np.ndarray]) -> None:
    """Tokens in pages that others begin with, too, and how many of these there are."""
    page, counts = 2, Counter[bytes]()
    pages = [[prompt[:end].tobytes() for end in range(page, len(prompt) + 1, page)] for prompt in prompts]
    for own in pages:
        counts.update(own)
    read = [
        [chain for chain in own[: (len(prompt) - 1) // page] if counts[chain] > 1]
        for own, prompt in zip(pages, prompts, strict=True)
    ]
    shared, readers = sharing([prompts], page)
    assert shared == pytest.approx(page * sum(map(len, read)) / len(prompts))
    distinct = len({chain for own in read for chain in own})
    # Of a chain's pages, those that only a prompt's last token keeps it from reading are computed by it anyway.
    assert readers >= (sum(map(len, read)) / distinct if distinct else math.inf) * (1 - 1e-9)


@pytest.mark.parametrize("shuffled", [False, True])
def test_peek_finds_what_prompts_share_wherever_they_stand(tmp_path: Path, shuffled: bool) -> None:
    """A system prompt of 32 bytes, 30 documents of 32, 20 questions of 8 about each; a page holds 16."""
    prompts = [f"{'s' * 32}{document:032}{question:08}" for document in range(30) for question in range(20)]
    if shuffled:
        np.random.default_rng(0).shuffle(prompts)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"custom_id": p[::-1], "prompt": p}) + "\n" for p in prompts))
    config = configure(path)
    lengths = peek_lengths(config, Bytes(), LIMITS)
    assert lengths.shared == 64
    assert lengths.mean_computed == pytest.approx(8 + 32 / 20, rel=0.2)
    config.kvcache.share_prefixes = False
    assert peek_lengths(config, Bytes(), LIMITS).mean_computed == 72
    path.write_text(json.dumps({"prompt": prompts[0], "n": 4}) + "\n")
    config.kvcache.share_prefixes = True
    lengths = peek_lengths(config, Bytes(), LIMITS)
    assert (lengths.count, lengths.sequences, lengths.sizes) == (1, 4, ((72, 16),) * 4)
    assert (lengths.shared, lengths.readers) == (64, 4)


def test_peek_knows_what_synthetic_prompts_share() -> None:
    config = configure("fixed9:60:0")
    config.workload.shared_tokens = 40
    assert peek_lengths(config, None, LIMITS).shared == 32
    assert peek_lengths(config, None, LIMITS).mean_computed == 28


def test_the_sample_file() -> None:
    path = Path(__file__).parent.parent / "bench" / "prompts.jsonl"
    items = list(open_workload(configure(path), Bytes(), Limits(256, 8192)))
    assert len({request(item).custom_id for item in items}) >= 16


# Whatever a file holds, each line that is not blank is one item.

VALID: list[dict[str, Any]] = [
    {
        "custom_id": "a",
        "method": "POST",
        "url": CHAT,
        "body": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_tokens": 4,
            "stop": ["x"],
            "seed": 3,
        },
    },
    {"custom_id": "b", "url": COMPLETIONS, "body": {"prompt": [1, 2], "temperature": 0.5, "top_k": 4}},
    {"prompt": "hi", "top_p": 0.5, "ignore_eos": True, "n": 1, "logprobs": False},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
]

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "\0", CHAT]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid line with one value replaced, or with its bytes damaged."""
    entry: Any = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    spots: list[tuple[Any, Any]] = []
    pending = [entry]
    while pending:
        node = pending.pop()
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in list(children):
            spots.append((node, key))
            if isinstance(child, dict | list):
                pending.append(child)
    if draw(st.booleans()):
        node, key = draw(st.sampled_from(spots))
        node[key] = draw(JSON_VALUES)
    raw = json.dumps(entry, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=3)) + raw[at + draw(st.integers(0, 3)) :]
    return raw


@settings(max_examples=150)
@given(lines=st.lists(st.binary(max_size=40) | mutated(), max_size=30))
def test_one_item_for_each_line_whatever_it_holds(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    data = b"\n".join([b"{}", *lines])  # how a file begins decides whether it is one of lines at all
    path = tmp_path_factory.mktemp("fuzz") / "in.jsonl"
    path.write_bytes(data)
    numbers = [number for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    items = read(configure(path))
    assert [item.line for item in items] == numbers
    assert len({item.custom_id for item in items}) == len(items)
    for item in items:
        json.dumps(item.custom_id).encode()
        if isinstance(item, Request):
            assert 1 <= len(item.prompt) <= 99 and item.prompt.min() >= 0 and item.prompt.max() < 256
            assert 1 <= item.sampling.max_tokens <= 100 - len(item.prompt)
            assert 0 <= item.sampling.seed < 2**63
        else:
            assert item.message.startswith(f"line {item.line}: ")
            item.message.encode()


@settings(max_examples=1500)
@given(raw=mutated())
def test_a_mutated_line_is_an_item(raw: bytes) -> None:
    reader = BatchFile(Intake(Bytes(), LIMITS, SamplingParams()), 32)
    assert isinstance(reader.item(1, raw), Request | Rejected)


# Defaults


def test_default_sampling() -> None:
    model = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    assert default_sampling(SamplingSection(), model) == SamplingParams(temperature=0.6, top_p=0.9)
    assert default_sampling(SamplingSection(), model | {"do_sample": False}) == SamplingParams()
    assert default_sampling(SamplingSection(), {}) == SamplingParams()
    assert default_sampling(SamplingSection(), {"do_sample": True, "top_k": None}).temperature == 1.0
    assert default_sampling(SamplingSection(temperature=0.0), model) == SamplingParams()
    assert default_sampling(SamplingSection(top_k=4), model) == SamplingParams(temperature=1.0, top_k=4)
    assert default_sampling(SamplingSection(stop=["a", "b"]), {}).stop == ("a", "b")
    with pytest.raises(UserError, match=r"sampling\.top_p"):
        default_sampling(SamplingSection(top_p=1.5), {})
    with pytest.raises(UserError, match=r"generation_config\.json: temperature"):
        default_sampling(SamplingSection(), {"do_sample": True, "temperature": "hot"})


# Data sets

ROWS: list[dict[str, Any]] = [
    {"message_id": "q1", "parent_id": None, "text": "why?", "role": "prompter", "lang": "en", "deleted": False},
    {"message_id": "a1", "parent_id": "q1", "text": "so", "role": "assistant", "lang": "en", "deleted": False},
    {"message_id": "q2", "parent_id": "a1", "text": "and?", "role": "prompter", "lang": "en", "deleted": False},
    {"message_id": "a2", "parent_id": "q1", "text": "no", "role": "assistant", "lang": "en", "deleted": True},
    {"message_id": "q3", "parent_id": "a2", "text": "oh?", "role": "prompter", "lang": "en", "deleted": False},
]
TURNS = [("oasst1-q1", "u:why?;"), ("oasst1-q2", "u:why?;a:so;u:and?;")]


def tree() -> dict[str, Any]:
    nodes = {row["message_id"]: {**row, "replies": []} for row in ROWS}
    for row in ROWS:
        parent = nodes[row["message_id"]].pop("parent_id")
        if parent is not None:
            nodes[parent]["replies"].append(nodes[row["message_id"]])
    return {"message_tree_id": "q1", "tree_state": "ready_for_export", "prompt": nodes["q1"]}


def json_lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    "records", [ROWS, ROWS[::-1], [tree()], [*ROWS, tree()]], ids=["rows", "reversed", "tree", "both"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_oasst1(tmp_path: Path, records: list[Any], zipped: bool) -> None:
    path = tmp_path / f"messages.jsonl{'.gz' if zipped else ''}"
    data = json_lines(records).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    for where in (path, tmp_path):
        items = read(configure("oasst1", where))
        assert sorted((item.custom_id, text(item)) for item in items) == TURNS
        assert all(request(item).endpoint == CHAT for item in items)


def test_oasst1_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    assert [(item.custom_id, text(item)) for item in read(configure("oasst1", tmp_path))] == TURNS


def test_oasst1_lost_parents_and_loops(tmp_path: Path) -> None:
    lost = {"message_id": "q", "parent_id": "gone", "text": "?", "role": "prompter"}
    loop = {"message_id": "r", "parent_id": "r", "text": "?", "role": "prompter"}
    (tmp_path / "m.jsonl").write_text(json_lines([lost, loop]))
    first, second = read(configure("oasst1", tmp_path))
    rejected(first, "invalid_request", "oasst1-q", "gone")
    rejected(second, "invalid_request", "oasst1-r")


CONVERSATIONS: list[Any] = [
    {
        "id": "x",
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "one"},
            {"from": "gpt", "value": "two"},
            {"from": "human", "value": "three"},
        ],
    },
    {"id": "x", "conversations": []},
    {"id": "z"},
    {"id": "y", "conversations": [{"from": "alien", "value": "?"}, {"from": "human", "value": "[é],\n"}]},
    {"id": "w", "conversations": [{"from": "human", "value": "z" * 50}]},
]


@pytest.mark.parametrize("form", ["array", "indented", "lines"])
def test_sharegpt(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deserve.workload.records.CHUNK", 7)  # values span what is read at once
    path = tmp_path / "sharegpt.json"
    indent = 2 if form == "indented" else None
    path.write_text(json_lines(CONVERSATIONS) if form == "lines" else json.dumps(CONVERSATIONS, indent=indent))
    one, three, ill, alien, last = read(configure("sharegpt", path))
    assert (one.custom_id, text(one)) == ("sharegpt-0-1", "s:s;u:one;")
    assert (three.custom_id, text(three)) == ("sharegpt-0-3", "s:s;u:one;a:two;u:three;")
    rejected(ill, "invalid_request", "sharegpt-2")
    rejected(alien, "invalid_value", "sharegpt-3-1", "alien")
    assert text(last) == f"u:{'z' * 50};"
    assert peek_lengths(configure("sharegpt", path), Bytes(), LIMITS).max_total == 53 + 16


@pytest.mark.parametrize("content", ["[{", '[{"a": 1}', "{]", '{"a": 1}', "[" * 10**5, "[" + '{"a":' * 10**5])
@pytest.mark.parametrize("source", ["oasst1", "sharegpt"])
def test_broken_data_sets(tmp_path: Path, source: str, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    try:
        items = read(configure(source, path))
    except UserError as error:
        assert "workload.path" in str(error)
    else:
        assert source == "sharegpt" and all(isinstance(item, Rejected) for item in items)


def test_a_record_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deserve.workload.records.CHUNK", 100)
    path = tmp_path / "sharegpt.json"
    path.write_text('[{"conversations": [{"from": "human", "value": "' + "z" * 10_000)
    config = configure("sharegpt", path)
    config.workload.max_line_mb = 0.002
    with pytest.raises(
        UserError, match=r"sharegpt\.json cannot be read: record 1 is longer than workload\.max_line_mb"
    ):
        open_workload(config, Bytes(), LIMITS)


def test_a_torn_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(ROWS * 20).encode())[:-12])
    with pytest.raises(UserError, match=r"workload\.path.*m\.jsonl\.gz"):
        open_workload(configure("oasst1", path), Bytes(), LIMITS)


def test_data_sets_through_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"OpenAssistant/oasst1": ROWS, "anon8231489123/ShareGPT_Vicuna_unfiltered": CONVERSATIONS}
    library = SimpleNamespace(load_dataset=lambda name, data_files, split: sets[name])
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert [(item.custom_id, text(item)) for item in read(configure("oasst1"))] == TURNS
    assert len(read(configure("sharegpt"))) == 5


def test_data_sets_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"OpenAssistant/oasst1 and set workload\.path"):
        open_workload(configure("oasst1"), Bytes(), LIMITS)
    with pytest.raises(UserError, match=r"workload\.path=.* does not exist"):
        open_workload(configure("sharegpt", tmp_path / "none"), Bytes(), LIMITS)
    with pytest.raises(UserError, match=r"workload\.path=.* holds no \.jsonl"):
        open_workload(configure("sharegpt", tmp_path), Bytes(), LIMITS)
