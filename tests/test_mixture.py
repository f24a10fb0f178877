"""Requests that ask for everything at once, through ranks that are far apart and short of memory."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from background import line_count, running, torchrun_command
from checkpoints import make_checkpoint, save_tokenizer
from launch import run_here
from results import code, read_results

from deserve.batch import PENDING, VisitPlan
from deserve.controller import Controller
from deserve.stage import Stage

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}, "required": ["b"]}
CALLED = {"type": "object", "properties": {"b": {"enum": ["x", "yy"]}}, "required": ["b"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CALLED}}
FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 110},
    {"structured_outputs": {"regex": "([a-z]{2,4},)+"}, "stop": ["q", "z,"]},
    {"stop": ["A", "e"], "min_tokens": 9},
    {"response_format": {"type": "json_object"}, "n": 2},
]
BESIDES: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 2, "temperature": 1.3},
    {"frequency_penalty": 0.9, "repetition_penalty": 1.2},
    {"presence_penalty": 1.0, "logprobs": True, "temperature": 0.8, "top_p": 0.95, "top_k": 300},
    {"prompt_logprobs": 1, "logit_bias": {"40": 3}, "bad_words": ["aa"], "temperature": 1.0, "min_p": 0.01},
]
COUNT = 60


def write_requests(path: Path) -> None:
    """Each a chat with a grammar or stop strings, and something about its probabilities."""
    with path.open("w") as file:
        for nth in range(COUNT):
            content = "The same beginning. " * (nth % 3) + f"Question {nth}?" * (1 + nth % 2)
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 20 + nth % 13, "seed": nth}
            body |= FORMS[nth % len(FORMS)] | BESIDES[nth % len(BESIDES)]
            file.write(json.dumps({"custom_id": f"{nth}", "url": "/v1/chat/completions", "body": body}) + "\n")


def answers(output: Path) -> dict[str, tuple[Any, Any, list[float]]]:
    """Of each line: its choices but for what is random in them, their usage, and all log-probabilities."""
    found = {}
    for entry in read_results(output):
        assert code(entry) is None and entry["custom_id"] not in found, entry
        body = entry["response"]["body"]
        usage = {key: body["usage"][key] for key in ("prompt_tokens", "completion_tokens")}
        numbers: list[float] = []
        for choice in body["choices"]:
            for call in choice["message"].get("tool_calls") or []:
                call.pop("id")
            numbers += [
                said["logprob"]
                for token in (choice.pop("logprobs") or {"content": []})["content"]
                for said in (token, *token["top_logprobs"])
            ]
        numbers += [
            said["logprob"] for position in body.get("prompt_logprobs") or [] for said in (position or {}).values()
        ]
        found[entry["custom_id"]] = body["choices"], usage, numbers
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("job")
    model = make_checkpoint(folder / "model", num_hidden_layers=2)
    save_tokenizer(model, TEMPLATE)
    write_requests(folder / "in.jsonl")
    return [f"model.path={model}", "device=cpu", f"workload.source={folder}/in.jsonl", "pipeline.tune=false"]


@pytest.fixture(scope="module")
def calm(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, list[float]]]:
    """The answers of one rank with all the memory it wants."""
    folder = tmp_path_factory.mktemp("calm")
    assert run_here(*job, f"output.dir={folder}") == 0
    calm = answers(folder)
    assert len(calm) == COUNT and len({json.dumps(choices) for choices, _, _ in calm.values()}) > COUNT // 2
    assert {choice["finish_reason"] for choices, _, _ in calm.values() for choice in choices} == {
        "stop",
        "length",
        "tool_calls",
    }
    return calm


def same(given: dict[str, Any], calm: dict[str, Any]) -> None:
    """All answers are those of `calm`."""
    assert given.keys() == calm.keys()
    for name, (choices, usage, numbers) in calm.items():
        assert given[name][:2] == (choices, usage), name
        np.testing.assert_allclose(given[name][2], numbers, atol=1e-4)


@pytest.mark.parametrize("pressed", [False, True])
def test_visits_planned_ahead_change_nothing(
    job: list[str],
    calm: dict[str, Any],
    pressed: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As on a GPU: the next visit is launched before anybody has seen what the last one has sampled."""
    pending = []
    forward = Stage.forward

    def counted(self: Stage, plan: VisitPlan, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        pending.append(int((x == PENDING).sum()))
        return forward(self, plan, x, *rest)

    monkeypatch.setattr(Stage, "forward", counted)
    monkeypatch.setattr(Controller, "ahead", property(lambda self: True, lambda self, value: None), raising=False)
    words = ["pipeline.rounds=1", "speculation.tokens=0"]
    if pressed:
        words += ["pipeline.micro_batch_size=12", "kvcache.main_pages=60", "kvcache.buddy_height=6"]
    assert run_here(*job, *words, f"output.dir={tmp_path}") == 0
    same(answers(tmp_path), calm)
    assert sum(pending) > 200
    pressure = json.loads((tmp_path / "metrics.json").read_text())["memory_pressure"]
    assert bool(pressure["suspensions"]) == pressed


def test_a_stop_far_away_and_short_of_memory_changes_nothing(
    job: list[str], calm: dict[str, Any], tmp_path: Path
) -> None:
    """Two ranks, 16 ms apart, three rounds whose sequences are swapped and suspended, stopped and gone on with."""
    far = ["network.latency_ms=16", "pipeline.rounds=3", "pipeline.micro_batch_size=6", "kvcache.main_pages=22"]
    far += ["kvcache.swap_pages=10", "kvcache.buddy_height=9", "pipeline.max_batch_tokens=96", "output.grace_s=0"]
    output = tmp_path / "out"
    command = torchrun_command(2, *job, *far, f"output.dir={output}")
    with running(command, output, tmp_path / "log") as stopped:
        stopped.until_answers(COUNT // 2, timeout_s=300)
        stopped.rank(1).terminate()
        assert stopped.wait(300) != 0 and not stopped.errors
        reason = f"SIGTERM to rank 1 on {socket.gethostname()}"
        assert f"traceback : deserve: stopped by {reason}" in stopped.log.split("Root Cause")[-1]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["stopped_by"] == reason
    assert metrics["memory_pressure"]["suspensions"] > 0
    assert line_count(output) < COUNT
    assert run_here(*job, f"output.dir={output}") == 0
    assert json.loads((output / "metrics.json").read_text())["resumed_tokens"] > 0
    same(answers(output), calm)
