"""Results: the format, and that no crash, full disk or second job loses or mixes lines."""

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from results import checked, code, read_results

from deserve.batch import AnswerForm, Completion, IntArray, Request, SamplingParams
from deserve.config import Config
from deserve.errors import UserError
from deserve.model.tools import Answer
from deserve.report.progress import Progress
from deserve.report.recorder import NON_FINITE_LIMIT, Recorder
from deserve.report.results import Manifest, ResultsWriter, failure
from deserve.report.unfinished import Unfinished
from deserve.text import AnswerReader
from deserve.workload.sampling import choices

CHAT = "/v1/chat/completions"

FILES = ("results.jsonl", "errors.jsonl")


def completion(custom_id: str, endpoint: str = "/v1/completions") -> Completion:
    request = Request(custom_id, np.arange(3, dtype=np.int32), endpoint=endpoint)
    return Completion(request, np.arange(2, dtype=np.int32), "stop")


def write(
    path: Path,
    *custom_ids: str,
    resume: bool = True,
    manifest: Manifest | None = None,
    retry: str = "auto",
    separate: bool = False,
) -> set[str]:
    with ResultsWriter(path, resume, "model", manifest, retry, separate) as writer:
        for custom_id in custom_ids:
            writer.completion(completion(custom_id), Answer("text"))
        return writer.done


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def test_format(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    with ResultsWriter(path, True, "smol") as writer:
        writer.completion(completion("a", CHAT), Answer("line\u2028two\x85\ud800"))
        writer.completion(completion("b"), Answer("é"))
        writer.error("c", "invalid_json", "line 3: not JSON")
        writer.error("d", "invalid_value", "line 4: n")
        writer.error("e", "model_not_found", "line 5: gpt")
        writer.error("f", "non_finite_logits", "NaN")
        assert len(path.read_bytes().splitlines()) == 6  # visible before closing
    chat, text, error, *refused = (json.loads(line) for line in path.read_text().splitlines())
    assert chat["id"].startswith("batch_req_") and chat["custom_id"] == "a" and chat["error"] is None
    assert chat["response"]["status_code"] == 200 and chat["response"]["request_id"]
    body = chat["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "smol")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "line\u2028two\x85\ud800"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert text["response"]["body"]["object"] == "text_completion"
    assert text["response"]["body"]["choices"][0]["text"] == "é"
    assert len({entry["id"] for entry in (chat, text, error)}) == 3
    assert error["response"] is None
    assert error["error"] == {"code": "invalid_json", "message": "line 3: not JSON"}
    assert all(checked(entry)["error"] is None for entry in refused)
    assert [entry["response"]["status_code"] for entry in refused] == [400, 404, 500]
    assert refused[0]["response"]["body"]["error"] == {
        "message": "line 4: n",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_value",
    }


def test_answers_with_calls_thoughts_and_token_ids(tmp_path: Path) -> None:
    form = AnswerForm(dialect="hermes", split_thoughts=True, return_token_ids=True)
    answer = Answer(None, (("f", "{}"),), "Well.", 1)
    with ResultsWriter(tmp_path / "results.jsonl", True, "smol") as writer:
        for reason in ("stop", "length"):
            asked = replace(completion(reason, CHAT).request, form=form)
            writer.completion(replace(completion(reason, CHAT), request=asked, finish_reason=reason), answer)
        asked = replace(completion("text").request, form=AnswerForm(return_token_ids=True))
        writer.completion(replace(completion("text"), request=asked), Answer("a"))
    stop, length, text = (entry["response"]["body"] for entry in read_results(tmp_path))
    (choice,) = stop["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Well.",
        "tool_calls": [{"id": call["id"], "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert (choice["finish_reason"], length["choices"][0]["finish_reason"]) == ("tool_calls", "length")
    assert stop["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    assert (stop["prompt_token_ids"], choice["token_ids"]) == ([0, 1, 2], [0, 1])
    assert (text["choices"][0]["prompt_token_ids"], text["choices"][0]["token_ids"]) == ([0, 1, 2], [0, 1])
    assert "completion_tokens_details" not in text["usage"]


def words(*tokens: tuple[float, ...]) -> IntArray:
    """`beside` of tokens, each with its log-probability, then ids of others, then theirs."""
    top = len(tokens[0]) // 2
    values = np.array(tokens, np.float32).view(np.int32)
    values[:, 1 : 1 + top] = np.array(tokens)[:, 1 : 1 + top]
    return values


def test_two_prompts_and_what_their_tokens_say(tmp_path: Path) -> None:
    """Two answers to each, the prompts echoed with log-probabilities, in whatever order the answers come."""
    form = AnswerForm(before="1 2", echo_logprobs=True, prompt_logprobs=1)
    sampling = SamplingParams(n=2, logprobs=1, prompt_logprobs=1)
    one = Request("two", np.array([1, 2], np.int32), sampling, form=form)
    line = replace(one, others=(replace(one, prompt=np.array([5], np.int32)),))
    asked = list(choices(line))
    assert [(len(each.prompt), each.choice, each.prompt_number) for each in asked] == [
        (2, 0, 0),
        (2, 1, 0),
        (1, 2, 1),
        (1, 3, 1),
    ]
    assert [each.sampling.prompt_logprobs for each in asked] == [1, None, 1, None]
    assert len({each.sampling.seed for each in asked}) == 4
    scores = np.hstack([words((-2.5, 9, -0.25)), np.array([[7]], np.int32)])
    answers = [
        Completion(each, np.array([6], np.int32), "length", None, words((-0.5, 6, -0.5)), 0, of_prompt)
        for each, of_prompt in zip(asked, (scores, None, scores[:0], None), strict=True)
    ]
    drop = Completion(
        replace(
            one, custom_id="none", answers=1, sampling=SamplingParams(), form=AnswerForm(before="1 2", prompt_only=True)
        ),
        np.array([6], np.int32),
        "stop",
    )
    failed = [replace(each, request=replace(each.request, custom_id="failed")) for each in answers]
    failed[3] = replace(failed[3], finish_reason="dead_end")
    progress = Progress(1, 0, io.StringIO())
    writer = ResultsWriter(tmp_path / "results.jsonl", True, "model")
    unfinished = Unfinished(tmp_path / "unfinished.jsonl", {})
    recorder = Recorder(writer, unfinished, AnswerReader(None), progress, torch.float32)
    for each in (*reversed(answers), drop, *failed):
        recorder.put(each)
    recorder.close()
    two, none, error = read_results(tmp_path)
    body = two["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 4
    for choice in body["choices"][:2]:
        assert choice["text"] == "1 26"
        assert choice["logprobs"] == {
            "tokens": ["1", "2", "6"],
            "token_logprobs": [None, -2.5, -0.5],
            "top_logprobs": [None, {"9": -0.25, "2": -2.5}, {"6": -0.5}],
            "text_offset": [0, 1, 2],
        }
        nine, own = (
            {"logprob": -0.25, "rank": 1, "decoded_token": "9"},
            {"logprob": -2.5, "rank": 7, "decoded_token": "2"},
        )
        assert choice["prompt_logprobs"] == [None, {"9": nine, "2": own}]
    assert body["choices"][2]["prompt_logprobs"] == [None]
    assert body["choices"][3]["logprobs"]["token_logprobs"] == [None, -0.5]
    only = none["response"]["body"]
    assert (only["choices"][0]["text"], only["choices"][0]["finish_reason"]) == ("1 2", "length")
    assert only["usage"]["completion_tokens"] == 0
    assert error["response"]["body"]["error"]["message"].startswith("prompt[1]: after 1 tokens")
    assert progress.summary()["input_tokens"] == 5


def test_errors_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path, True, "model", separate_errors=True) as writer:
        writer.completion(completion("a"), Answer("text"))
        writer.error("plan", "kv_memory_exceeded", "4 pages")
        writer.error("input", "invalid_json", "line 3")
    names = {name: [(line["custom_id"], code(line)) for line in read_results(tmp_path, name)] for name in FILES}
    errors = [("plan", "kv_memory_exceeded"), ("input", "invalid_json")]
    assert names == {"results.jsonl": [("a", None)], "errors.jsonl": errors}
    with (tmp_path / "errors.jsonl").open("ab") as file:
        file.write(b'{"id": ')  # torn by a crash
    with ResultsWriter(path, True, "model", separate_errors=True) as writer:
        assert (writer.done, writer.retried) == ({"a", "input"}, 1)
        writer.error("plan", "kv_memory_exceeded", "4 pages")
    assert len(read_results(tmp_path, "errors.jsonl")) == 2
    with ResultsWriter(path, True, "model") as writer:  # now to the same file: it must be whole by itself
        writer.error("plan", "kv_memory_exceeded", "4 pages")
    assert codes(path) == [("a", None), ("plan", "kv_memory_exceeded")]
    assert write(path, "plan", separate=True) == {"a", "input"}
    assert write(path, separate=True) == write(path) == {"a", "input", "plan"}  # an answer counts before any error
    write(path, "a", resume=False, separate=True)
    assert ids(tmp_path / "results.jsonl.1") == ["a", "plan", "plan"] and ids(tmp_path / "errors.jsonl.1")
    assert (ids(path), ids(tmp_path / "errors.jsonl")) == (["a"], [])


def test_resume_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert write(path, "a", "b") == set()
    assert write(path, "c") == {"a", "b"}
    assert ids(path) == ["a", "b", "c"]


def test_without_resume_old_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for custom_id in "abc":
        assert write(path, custom_id, resume=False) == set()
    names = ["results.jsonl.1", "results.jsonl.2", "results.jsonl"]
    assert [ids(tmp_path / name) for name in names] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("broken", [b"junk\n", b"{}\n", b"[]\n", b"\n", b"\0" * 9, b'{"custom_id": "b"}', b"\xff\n"])
def test_a_torn_last_line_is_redone(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "results.jsonl"
    write(path, "a")
    path.write_bytes(path.read_bytes() + broken)
    assert write(path, "b") == {"a"}
    assert ids(path) == ["a", "b"]


@settings(max_examples=60)
@given(cut=st.integers(0, 1200))
def test_a_file_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "results.jsonl"
    write(path, "a", "b", "c")
    path.write_bytes(path.read_bytes()[:cut])
    whole = path.read_bytes().count(b"\n")
    done = write(path)
    assert done == {"a", "b", "c"} if whole == 3 else len(done) == whole
    write(path, *sorted({"a", "b", "c"} - done))
    assert ids(path) == ["a", "b", "c"]


def test_a_corrupt_line_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, "a", "b")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"junk\n" + second)
    with pytest.raises(UserError, match=r"results\.jsonl: line 2 is corrupt"):
        write(path)
    path.write_bytes(first + second)
    assert write(path) == {"a", "b"}  # the failed attempt left no lock behind


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    room = 700
    system_write = os.write

    def full(file: int, data: Any) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = system_write(file, bytes(data)[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with ResultsWriter(path, True, "model") as writer:
        writer.completion(completion("a"), Answer("text"))
        with pytest.raises(UserError, match=r"results\.jsonl cannot be written: No space"):
            writer.completion(completion("b"), Answer("text"))
        assert ids(path) == ["a"]
        room = 10_000
        writer.completion(completion("b"), Answer("text"))
    assert ids(path) == ["a", "b"]


def test_one_job_for_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = (
        "import sys; from pathlib import Path; from deserve.report.results import ResultsWriter\n"
        "w = ResultsWriter(Path(sys.argv[1]), True, 'm'); print('open', flush=True); sys.stdin.read()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        for resume in (True, False):
            with pytest.raises(UserError, match=r"output\.dir=.* is in use by another job"):
                write(path, resume=resume)
        other.kill()
    assert write(path) == set()  # a killed job holds nothing


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output\.dir=.*/file is a file: give a folder"):
        write(tmp_path / "file" / "results.jsonl")
    with pytest.raises(UserError, match=r"output\.dir=.*/file/deep cannot be written: .*Not a directory"):
        write(tmp_path / "file" / "deep" / "results.jsonl")


def test_a_full_disk_leaves_no_scratch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"manifest\.json cannot be written: No space"):
        manifest("fixed1:2:0").write(tmp_path / "manifest.json")
    assert not list(tmp_path.iterdir())


def manifest(source: Path | str, model: Any = "sha", **sampling: Any) -> Manifest:
    config = Config()
    config.workload.source = str(source)
    for key, value in sampling.items():
        setattr(config.sampling, key, value)
    return Manifest.of(config, model, "float32")


def test_manifest_stops_a_resume_of_another_job(tmp_path: Path) -> None:
    path, source = tmp_path / "out" / "results.jsonl", tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    write(path, "a", manifest=manifest(source))
    moved = source.rename(tmp_path / "moved.jsonl")
    assert write(path, manifest=manifest(moved)) == {"a"}
    for other, word in [
        (manifest("fixed1:2:0"), r"input \(workload\.source\)"),
        (manifest(moved, "other"), "model"),
        (manifest(moved, temperature=0.5), "sampling parameters"),
        (manifest("fixed1:2:0", "other"), r"input \(workload\.source\), model"),
    ]:
        with pytest.raises(UserError, match=rf"with other {word}\. .*output\.resume=false.*output\.dir"):
            write(path, manifest=other)
    moved.write_text('{"prompt": "b"}\n')
    with pytest.raises(UserError, match="input"):
        write(path, manifest=manifest(moved))
    assert write(path, "b", resume=False, manifest=manifest(moved)) == set()
    assert write(path, manifest=manifest(moved)) == {"b"}
    assert not list(path.parent.glob("*.tmp"))


def test_manifest_missing_or_broken(tmp_path: Path) -> None:
    path, record = tmp_path / "results.jsonl", tmp_path / "manifest.json"
    write(path, manifest=manifest("fixed1:2:0"))
    write(path, "a", manifest=manifest("fixed2:2:0"))  # nothing was answered yet
    for content in ("[]", "{", None):
        record.unlink() if content is None else record.write_text(content)
        with pytest.raises(UserError, match=r"output\.resume=false"):
            write(path, manifest=manifest("fixed2:2:0"))


def test_manifest_of_an_unreadable_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workload\.source: .*none\.jsonl cannot be read"):
        manifest(tmp_path / "none.jsonl")


@pytest.mark.parametrize("healthy", [None, 0, 10])
def test_a_job_whose_first_requests_all_lack_finite_logits_ends(healthy: int | None, tmp_path: Path) -> None:
    """And one in which any of them ends well goes on to its end. `healthy`: the number of that request."""
    with ResultsWriter(tmp_path / "results.jsonl", True, "model") as writer:
        progress = Progress(None, 0, io.StringIO())
        unfinished = Unfinished(tmp_path / "unfinished.jsonl", "model")
        recorder = Recorder(writer, unfinished, lambda _: Answer(""), progress, torch.float16)
        for number in range(40):
            answered = completion(f"{number}")
            recorder.put(answered if number == healthy else replace(answered, finish_reason="error"))
            if healthy is None and number == NON_FINITE_LIMIT - 1:
                break
        if healthy is None:
            with pytest.raises(UserError, match=r"first 16 requests all ended with NaN .*float16.*model\.dtype"):
                recorder.close()
            assert recorder.non_finite == NON_FINITE_LIMIT == progress.summary()["errors"]
        else:
            recorder.close()
            assert recorder.non_finite == 39 == progress.summary()["errors"]
    errors = [failure(line) for line in read_results(tmp_path)]
    message = "NaN or infinite logits after 2 tokens in float16"
    assert {(error["code"], error["message"].split(",")[0]) for error in errors if error} == {
        ("non_finite_logits", message)
    }


def codes(path: Path) -> list[tuple[str, str | None]]:
    return [(entry["custom_id"], code(entry)) for entry in read_results(path.parent, path.name)]


@pytest.mark.parametrize(("retry", "retried"), [("auto", {"plan"}), ("all", {"plan", "input"}), ("none", set())])
def test_errors_that_are_tried_again(tmp_path: Path, retry: str, retried: set[str]) -> None:
    """The last line of a request counts; an error that stays the same is not written again."""
    path = tmp_path / "results.jsonl"
    errors = {"plan": "kv_memory_exceeded", "input": "invalid_json"}
    written = [("a", None), *errors.items()]
    with ResultsWriter(path, True, "model") as writer:
        writer.completion(completion("a"), Answer("text"))
        for name, code in errors.items():
            writer.error(name, code, "4 pages")
    with ResultsWriter(path, True, "model", retry_errors=retry) as writer:
        assert (writer.done, writer.retried) == ({"a", "plan", "input"} - retried, len(retried))
        for name in sorted(retried):
            writer.error(name, errors[name], "4 pages")
    assert codes(path) == written
    with ResultsWriter(path, True, "model", retry_errors=retry) as writer:
        for name in sorted(retried):
            writer.error(name, errors[name], "8 pages")
    assert write(path, *retried, retry=retry) == {"a", "plan", "input"} - retried
    assert codes(path)[3:] == [*((name, errors[name]) for name in sorted(retried)), *((name, None) for name in retried)]
    assert write(path, retry=retry) == {"a", "plan", "input"}


def test_errors_to_be_tried_again_stand_in_no_other_jobs_way(tmp_path: Path) -> None:
    path, other = tmp_path / "results.jsonl", manifest("fixed1:2:0", "with a tokenizer")
    with ResultsWriter(path, True, "model", manifest("fixed1:2:0")) as writer:
        writer.error("a", "no_tokenizer", "none")
    assert write(path, manifest=manifest("fixed1:2:0")) == set()
    assert codes(path) == [("a", "no_tokenizer")]
    assert write(path, "a", manifest=other) == set()
    assert (ids(tmp_path / "results.jsonl.1"), ids(path)) == (["a"], ["a"])
    assert write(path, manifest=other) == {"a"}
    with pytest.raises(UserError, match="with other model"):
        write(path, manifest=manifest("fixed1:2:0"))


@pytest.mark.parametrize(
    ("before", "now", "resumed"),
    [
        ("1\n2\n", "1\n2\n3\n", True),
        ("1\n2\n", "1\n2\n3", True),
        ("1\n2", "1\n2\n3\n", True),
        ("1\n2", "1\n23\n", False),
        ("1\n2\n", "1\n3\n4\n", False),
        ("1\n2\n", "0\n1\n2\n", False),
        ("1\n2\n", "1\n", False),
        ("1\n2\n", "1\n2", False),
    ],
)
def test_an_input_that_grew_by_lines_is_resumed(tmp_path: Path, before: str, now: str, resumed: bool) -> None:
    path, source = tmp_path / "out" / "results.jsonl", tmp_path / "in.jsonl"
    source.write_text(before)
    write(path, "a", manifest=manifest(source))
    source.write_text(now)
    if not resumed:
        with pytest.raises(UserError, match=r"other input \(workload\.source\)\. "):
            write(path, manifest=manifest(source))
        return
    assert write(path, manifest=manifest(source)) == {"a"}
    source.write_text(before)  # what has grown may not shrink again
    with pytest.raises(UserError, match="other input"):
        write(path, manifest=manifest(source))


def test_what_else_the_manifest_tells_apart(tmp_path: Path) -> None:
    path, data = tmp_path / "out" / "results.jsonl", tmp_path / "in.json"
    data.write_text("[]")
    config = Config()
    config.workload.source, config.workload.path = "oasst1", str(data)
    write(path, "a", manifest=Manifest.of(config, "sha", "float32"))
    with pytest.raises(UserError, match=r"with other model\.dtype\. "):
        write(path, manifest=Manifest.of(config, "sha", "bfloat16"))
    config.workload.reasoning = "keep"
    with pytest.raises(UserError, match=r"with other workload\.chat_template or workload\.reasoning\. "):
        write(path, manifest=Manifest.of(config, "sha", "float32"))
    config.workload.reasoning, config.workload.chat_template = "auto", str(data)
    with pytest.raises(UserError, match=r"with other workload\.chat_template"):
        write(path, manifest=Manifest.of(config, "sha", "float32"))
    config.workload.chat_template = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"workload\.chat_template: .*none cannot be read: No such file"):
        Manifest.of(config, "sha", "float32")
    config.workload.chat_template, config.comm.activations = None, "fp8"
    with pytest.raises(UserError, match=r"with other comm\.activations"):
        write(path, manifest=Manifest.of(config, "sha", "float32"))
    config.comm.activations, config.kvcache.dtype = "auto", "fp8"
    with pytest.raises(UserError, match=r"or kvcache\.dtype"):
        write(path, manifest=Manifest.of(config, "sha", "float32"))
    config.kvcache.dtype = "auto"
    written = path.with_name("manifest.json")
    older = json.loads(written.read_text())
    del older["coded"]
    written.write_text(json.dumps(older))
    write(path, manifest=Manifest.of(config, "sha", "float32"))
    config.workload.source = "sharegpt"  # the same file, read as other requests
    with pytest.raises(UserError, match="with other input"):
        write(path, manifest=Manifest.of(config, "sha", "float32"))


def test_files_that_change_under_a_job(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("1\n2\n")
    record = manifest(source)
    assert record.changed_file() is None
    source.write_text("1\n2\n3\n")
    assert record.changed_file() is None  # what was counted is still there
    for content in ("1\n3\n", "1\n", ""):
        source.write_text(content)
        assert record.changed_file() == source
    source.unlink()
    assert record.changed_file() is None  # an open file can be read to its end
    config = Config()
    config.workload.source, config.workload.path = "sharegpt", str(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    record = Manifest.of(config, "sha", "float32")
    (tmp_path / "b.json").unlink()  # before it was read, perhaps
    assert record.changed_file() == tmp_path / "b.json"
