"""A job that is stopped or killed goes on with the answers that it had begun, and ends with the same ones."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import run_here
from results import read_results

from deserve.batch import Begun, Completion, Request, SamplingParams, VisitPlan
from deserve.controller import Controller
from deserve.report.unfinished import Unfinished
from deserve.stop import STOPPED

SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "array", "items": {"type": "integer"}}},
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "seed": 5, "top_p": 0.95, "top_k": 40},
    "penalised": {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    "biased": {"logit_bias": {"65": 6, "66": 5}, "bad_words": ["AB"], "temperature": 1.2},
    "late": {"min_tokens": 20, "ignore_eos": False, "logit_bias": {"256": 9}},
    "several": {"n": 3, "temperature": 1.1, "seed": 3},
    "probable": {"logprobs": 3, "temperature": 0.8, "n": 2},
    "formed": {"response_format": SCHEMA, "temperature": 1.0, "ignore_eos": False},
    "cut": {"stop": ["AA", "BB"], "logit_bias": {"65": 8, "66": 8}, "temperature": 1.0},
}


def write_requests(path: Path) -> None:
    lines = [
        {
            "custom_id": f"{kind}-{length}",
            "prompt": [7 * (length + at) % 250 for at in range(length)],
            "max_tokens": 24 + length % 17,
            "ignore_eos": True,
            **said,
        }
        for length in (1, 17, 40)
        for kind, said in KINDS.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def answers(output: Path) -> tuple[dict[str, Any], list[float]]:
    """What each line says but for when, and for what others computed; and all log-probabilities."""
    found, logprobs = {}, {}
    for entry in read_results(output):
        body = entry["response"]["body"]
        assert entry["custom_id"] not in found and entry["response"]["status_code"] == 200, entry
        usage = {key: body["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        said = [choice.pop("logprobs") for choice in body["choices"]]
        found[entry["custom_id"]] = body["choices"], usage
        logprobs[entry["custom_id"]] = [
            number
            for of in filter(None, said)
            for token, top in zip(of["token_logprobs"], of["top_logprobs"], strict=True)
            for number in (token, *sorted(top.values()))
        ]
    return found, [number for name in sorted(logprobs) for number in logprobs[name]]


def test_every_kind_of_answer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Stopped again and again, each time after so many visits that no answer of any length is whole at once."""
    write_requests(tmp_path / "in.jsonl")
    # A round of few pages, so that some are suspended when the job stops
    job = ["model=tiny", "device=cpu", f"workload.source={tmp_path}/in.jsonl", "pipeline.rounds=2"]
    job += ["pipeline.micro_batch_size=9", "kvcache.main_pages=30", "kvcache.swap_pages=0", "output.grace_s=0"]
    job += ["speculation.tokens=0"]  # so that a visit brings a token of each sequence, however fast the machine is
    assert run_here(*job, f"output.dir={tmp_path}/calm") == 0
    calm = json.loads((tmp_path / "calm" / "metrics.json").read_text())
    assert calm["resumed_tokens"] == 0 and not (tmp_path / "calm" / "unfinished.jsonl").exists()
    visits, saved = 0, []
    plan = Controller.next_visit

    def stopping(self: Controller, micro_batch: int) -> tuple[VisitPlan, Any]:
        nonlocal visits
        visits += 1
        if visits == 20:  # as a thread of the pulse does when another rank has died
            thread = threading.Thread(target=self.save_now)
            thread.start()
            thread.join()
            saved.append((tmp_path / "out" / "unfinished.jsonl").read_bytes().count(b"\n"))
            self._deciding.release()  # the process would have ended
        if visits == 30:
            os.kill(os.getpid(), signal.SIGTERM)
            while self._stop.reason is None:
                signal.sigtimedwait([], 0.01)
        return plan(self, micro_batch)

    monkeypatch.setattr(Controller, "next_visit", stopping)
    sampled, starts = 0, []
    while not starts or starts[-1] == STOPPED:
        visits = 0
        starts.append(run_here(*job, f"output.dir={tmp_path}/out"))
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert (metrics["resumed_tokens"] > 0) == (len(starts) > 1)
        sampled += sum(metrics["history"]["output_tokens"])
    (out, logprobs), (right, right_logprobs) = answers(tmp_path / "out"), answers(tmp_path / "calm")
    assert out == right
    np.testing.assert_allclose(logprobs, right_logprobs, atol=1e-4)
    # A stop loses the tokens that are under way, no more: one of each sequence.
    assert len(starts) > 3 and sampled <= sum(calm["history"]["output_tokens"]) + 18 * len(starts)
    assert min(saved) > 1 and not (tmp_path / "out" / "unfinished.jsonl").exists()
    assert f"{metrics['resumed_tokens']:,} tokens of {metrics['resumed_answers']} answers" in capsys.readouterr().out


def request(custom_id: str, prompt: int = 3, **sampling: Any) -> Request:
    return Request(custom_id, np.arange(prompt, dtype=np.int32), SamplingParams(**sampling))


def so_far(of: Request, tokens: int, width: int = 0) -> Request:
    beside = np.repeat(np.arange(tokens, dtype=np.int32)[:, None], width, 1) if width else None
    return replace(of, begun=Begun(np.arange(tokens, dtype=np.int32), beside, cached_tokens=2))


def begun(path: Path, of: Request, model: Any = "model", done: tuple[str, ...] = ()) -> Begun:
    """What a start finds of the answer to `of`."""
    continued = Unfinished(path, model, done).continued(of)
    return (continued.request if isinstance(continued, Completion) else continued).begun


def test_what_is_kept_of_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "unfinished.jsonl"
    kept = Unfinished(path, "model")
    several = request("several", n=2)
    kept.note([so_far(request("a"), 4), so_far(request("b"), 3, width=5), so_far(several, 1)])
    kept.whole(Completion(several, np.arange(6, dtype=np.int32), "stop", "te\ud800xt", cached_tokens=1))
    kept.write()
    again = Unfinished(path, "model", done=["a"])
    assert again.continued(request("a")).begun.tokens.tolist() == []
    b = again.continued(request("b"))
    assert isinstance(b, Request) and b.length == 6
    assert b.begun.tokens.tolist() == [0, 1, 2] and b.begun.beside.tolist() == [[at] * 5 for at in range(3)]
    assert b.begun.cached_tokens == 2
    whole = again.continued(several)
    assert isinstance(whole, Completion) and whole.tokens.tolist() == list(range(6))
    assert (whole.finish_reason, whole.text, whole.cached_tokens) == ("stop", "te\ud800xt", 1)
    assert (again.resumed, again.resumed_tokens) == (2, 9)
    # What has not come into flight again is kept for the next start, until it is answered.
    again.note([so_far(request("b"), 7, width=5)])
    again.write()
    assert len(begun(path, request("b")).tokens) == 7 and len(begun(path, several).tokens) == 6
    again.answered(b)
    again.answered(several)
    again.write()
    assert not path.exists()


def test_what_does_not_fit_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An answer to another prompt, or one of other parameters; a file of another model; a torn one."""
    path = tmp_path / "unfinished.jsonl"
    assert not len(begun(path, request("a")).tokens)
    kept = Unfinished(path, "model")
    kept.note([so_far(request("a"), 4)])
    kept.write()
    assert len(begun(path, request("a")).tokens) == 4
    for other in (request("a", prompt=4), request("a", seed=1), request("a", max_tokens=7)):
        assert not len(begun(path, other).tokens)
    assert not capsys.readouterr().err
    assert not len(begun(path, request("a"), model="another").tokens)
    assert "unfinished.jsonl is of another model: it is ignored" in capsys.readouterr().err
    data = path.read_bytes()
    for torn in (data[:-9], data[: data.index(b"\n")], b"", b"\xff\n[]", b"[]\n" + data, data.replace(b"custom", b"c")):
        path.write_bytes(torn)
        assert not len(begun(path, request("a")).tokens)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("deserve: ") and "unfinished.jsonl is torn: it is ignored" in line
    path.unlink()
    path.mkdir()
    kept.write()
    kept.write()
    assert not len(begun(path, request("a")).tokens)
    cannot_write, cannot_read = capsys.readouterr().err.splitlines()
    assert "cannot be written: Is a directory" in cannot_write and "cannot be read (Is a directory)" in cannot_read
    assert not list(tmp_path.glob("*.tmp"))


def test_copies_come_often_where_they_are_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Unfinished(tmp_path / "unfinished.jsonl", "model")
    now = [0.0]
    monkeypatch.setattr("deserve.report.unfinished.time.monotonic", lambda: now[0])
    for took, due in ((0.0, 0.25), (0.01, 0.5), (0.1, 5.0), (0.3, 10.0), (2.0, 40.0)):
        monkeypatch.setattr(kept, "write", lambda took=took: now.__setitem__(0, now[0] + took))
        kept.save([so_far(request("a"), 4)])
        assert kept.due_s(10) == pytest.approx(due)
    assert Unfinished(tmp_path / "unfinished.jsonl", "model").due_s(0.1) == 0.1
