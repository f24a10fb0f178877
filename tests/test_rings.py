"""Many rings, one job: requests are shared out as rings ask for them, and each is answered once, as by one ring."""

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from background import line_count, running, torchrun_command, unfinished
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import run_here, run_jobs
from results import code, read_results

from deserve.batch import Begun, Completion, Request, Rules, SamplingParams
from deserve.config import load_config
from deserve.dispatch.client import Client
from deserve.dispatch.dispatcher import Dispatcher
from deserve.dispatch.messages import (
    Portion,
    Report,
    decode_portion,
    decode_report,
    encode_portion,
    encode_report,
)
from deserve.errors import UserError
from deserve.plan import load_plan_config, plan

PAGE = 4
COUNT = 160


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


class Source:
    """Requests of which `ready` more are there whenever there were no more."""

    def __init__(self, requests: list[Request], ready: int | None = None):
        self._left, self._burst = list(reversed(requests)), ready or len(requests)
        self._ready = self._burst

    def poll(self) -> Request | None:
        self._ready -= 1
        if self._ready < 0 or not self._left:
            self._ready = self._burst
            return None
        return self._left.pop()

    @property
    def exhausted(self) -> bool:
        return not self._left


class Desk:
    """In place of the recorder and of progress."""

    def __init__(self) -> None:
        self.outcomes: list[Any] = []
        self.counted = 0

    def put(self, outcome: Any) -> None:
        self.outcomes.append(outcome)

    def flush(self, timeout_s: float) -> None:
        self.outcomes.append("flushed")

    def tokens(self, count: int, trips: int) -> None:
        self.counted += count


def dispatcher(
    requests: list[Request], rings: int, grouped: bool = True, ready: int | None = None
) -> tuple[Dispatcher, Desk]:
    desk: Any = Desk()
    return Dispatcher(Source(requests, ready), desk, desk, [1.0] * rings, PAGE, grouped), desk


def answered(request: Request) -> Completion:
    return Completion(request, ids(1, 2), "length")


def test_what_travels_arrives() -> None:
    rules = Rules(bias=((3, 0.5),), banned=((1, 2), (4,)), allowed=(7,))
    sampling = SamplingParams(9, 0.5, stop=("a", "\u2028"), stop_token_ids=(5,), rules=rules, grammar="x", logprobs=2)
    begun = Begun(ids(5, 6), np.arange(10, dtype=np.int32).reshape(2, 5), 3)
    request = Request("\ud800é", ids(1, 2, 3), sampling, choice=2, answers=4, begun=begun)
    wire = json.loads(json.dumps(encode_portion(Portion([request, Request("b", ids(1))], True))))
    found, plain = decode_portion(wire).requests
    assert found.key == request.key and found.sampling == sampling and found.begun.cached_tokens == 3
    assert decode_portion(wire).last and plain.begun.beside is None and plain.sampling == SamplingParams()
    for one, other in (
        (found.prompt, request.prompt),
        (found.begun.tokens, begun.tokens),
        (found.begun.beside, begun.beside),
    ):
        assert np.array_equal(one, other) and one.dtype == np.int32
    scores = np.arange(6, dtype=np.int32).reshape(2, 3)
    done = Completion(found, ids(8), "stop", "text", begun.beside, 1, scores)
    report = Report(
        4, [done, [replace(found, begun=Begun(ids(8), scores, 2)), replace(found, begun=Begun())]], 5, 6, True, True
    )
    wire = json.loads(json.dumps(encode_report(report)))
    back = decode_report(wire, {request.key: request})
    completion, (so_far, young) = back.outcomes
    assert isinstance(completion, Completion) and completion.request is request and so_far.key == request.key
    assert (completion.text, completion.finish_reason, completion.cached_tokens) == ("text", "stop", 1)
    assert np.array_equal(completion.prompt_beside, scores) and np.array_equal(so_far.begun.beside, scores)
    assert so_far.begun.tokens.tolist() == [8] and young.begun.beside is None and len(young.begun.tokens) == 0
    assert replace(back, outcomes=[]) == replace(report, outcomes=[])


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 60), st.data())
def test_rings_share_all_requests_and_end_together(rings: int, count: int, data: st.DataObject) -> None:
    """Whoever asks when, for however many: each request goes to one ring, and nobody hoards the last ones."""
    stems = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    requests = [Request(f"{n}", ids(*[stem] * PAGE, n)) for n, stem in enumerate(stems)]
    desk, sink = dispatcher(requests, rings, data.draw(st.booleans()))
    held: list[list[Request]] = [[] for _ in range(rings)]
    given_out: Counter[str] = Counter()
    ended = [False] * rings
    while not all(ended):
        number = data.draw(st.sampled_from([ring for ring in range(rings) if not ended[ring]]))
        done = data.draw(st.integers(0, len(held[number])))
        report = Report(data.draw(st.integers(1, 20)), [answered(request) for request in held[number][:done]])
        held[number] = held[number][done:]
        undone = count - len(sink.outcomes) - done
        portion = desk.serve(number, report)
        held[number] += portion.requests
        given_out.update(request.custom_id for request in portion.requests)
        if portion.requests:
            assert len(held[number]) <= max(1, -(-undone // rings))
        ended[number] = portion.last and not held[number]
        assert portion.last or held[number] or any(held)
    assert given_out == Counter(f"{n}" for n in range(count))
    assert sorted(int(each.request.custom_id) for each in sink.outcomes) == list(range(count))
    assert sum(ledger.totals["requests"] for ledger in desk.ledgers) == count


def test_a_faster_ring_gets_more_of_the_last_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    desk, _ = dispatcher([Request(f"{n}", ids(n)) for n in range(90)], 2)
    for _ in range(100):
        now[0] += 1
        desk.serve(0, Report(tokens=100))
        desk.serve(1, Report(tokens=200))
    assert len(desk.serve(0, Report(1000)).requests) in range(31, 36)
    assert len(desk.serve(1, Report(1000)).requests) in range(55, 60)


@pytest.mark.parametrize(("reason", "most"), [("length", 51), ("stop", 75)])
def test_answers_that_are_nearly_complete_count_little(reason: str, most: int) -> None:
    """Rings whose answers all end at once: the first to ask must not take what the other asks for a moment later."""
    desk, _ = dispatcher([Request(f"{n}", ids(n)) for n in range(200)], 2, grouped=False)
    early, late = (desk.serve(number, Report(75)).requests for number in range(2))
    desk.serve(1, Report(tokens=50 * 99, trips=50 * 99))  # 50 of its 75 answers lack one token
    done = [Completion(request, np.zeros(100, np.int32), reason) for request in early[:50]]
    desk.serve(0, Report(1000, done, tokens=50 * 100))
    done = [Completion(request, np.zeros(100, np.int32), reason) for request in late[:50]]
    desk.serve(1, Report(1000, done, tokens=50))
    # Answers that end by themselves may be far from their end however long they are.
    assert max(len(ledger.requests) for ledger in desk.ledgers) in range(most - 1, most + 2)


@pytest.mark.parametrize(("scattered", "ready"), [(False, None), (True, None), (True, 64)])
def test_requests_that_share_go_to_one_ring(scattered: bool, ready: int | None) -> None:
    """50 documents with 20 questions each, in any order and read in pieces: hardly a document is computed by
    two rings."""
    document = np.random.default_rng(0).integers(0, 300, (50, 10 * PAGE), np.int32)
    requests = [
        Request(f"{doc}-{question}", np.concatenate([ids(*range(PAGE)), document[doc], ids(question)]))
        for doc in range(50)
        for question in range(20)
    ]
    if scattered:
        requests = [requests[nth] for nth in np.random.default_rng(1).permutation(len(requests))]
    desk, _ = dispatcher(requests, 2, ready=ready)
    held: list[list[Request]] = [[], []]
    seen: list[set[str]] = [set(), set()]
    while any(held) or not seen[0]:
        for number in range(2):
            done, held[number] = held[number][:7], held[number][7:]
            portion = desk.serve(number, Report(max(0, 48 - len(held[number])), [answered(each) for each in done]))
            held[number] += portion.requests
            seen[number] |= {request.custom_id.partition("-")[0] for request in portion.requests}
    assert len(seen[0] | seen[1]) == 50 and len(seen[0] & seen[1]) <= 2
    assert all(len(each) >= 20 for each in seen)


def test_the_last_save_waits_for_the_other_rings() -> None:
    desk, sink = dispatcher([Request("a", ids(1)), Request("b", ids(2))], 2)
    client = Client(lambda report: desk.serve(0, report), 1, lambda error: None)
    client.wait(1)
    request = client.poll()
    assert request is not None
    other = desk.serve(1, Report(1)).requests[0]
    client.put([replace(request, begun=Begun(ids(1)))])
    saving = threading.Thread(target=client.flush, args=(30,))
    saving.start()
    desk.serve(1, Report(outcomes=[[replace(other, begun=Begun(ids(2)))]], saves=True))
    saving.join()
    assert len(sink.outcomes) == 3 and sink.outcomes[-1] == "flushed"
    client.put(answered(request))
    client.tokens(2, 1)
    client.close()
    assert sink.counted == 2 and desk.ledgers[0].closed and not desk.ledgers[0].requests
    desk.serve(1, Report(closes=True))
    desk.wait()


def write_requests(path: Path, count: int, longest: int = 24) -> None:
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(count):
            prompt = random.integers(0, 320, int(random.integers(1, 60))).tolist()
            line: dict[str, Any] = {"prompt": prompt, "custom_id": f"r{number}", "max_tokens": 1 + number % longest}
            if number % 7 == 1:
                line |= {"n": 2, "temperature": 1.0, "seed": number}
            if number % 7 == 2:
                line |= {"logprobs": 2, "echo": number % 2 == 0}
            if number % 7 == 3:
                line |= {"repetition_penalty": 1.3, "logit_bias": {"3": 2.5}, "stop_token_ids": [5]}
            if number % 7 == 4:
                line["prompt"] = [prompt, [1, 2, 3]]
            if number == 12:
                line["no_such_key"] = 1
            file.write(json.dumps(line) + "\n")


def outcomes(output: Path) -> dict[str, Any]:
    """What each request got, apart from ids, times, and what others had computed."""
    found = {}
    for entry in read_results(output):
        assert entry["custom_id"] not in found
        body = entry["response"]["body"]
        found[entry["custom_id"]] = (code(entry), body.get("choices"), body.get("usage", {}).get("completion_tokens"))
    return found


def without_numbers(value: Any, numbers: list[float]) -> Any:
    """`value` without the fractions in it, which go to `numbers`."""
    if isinstance(value, float):
        numbers.append(value)
        return None
    if isinstance(value, dict):
        return {key: without_numbers(each, numbers) for key, each in value.items()}
    return [without_numbers(each, numbers) for each in value] if isinstance(value, list | tuple) else value


def assert_same(found: dict[str, Any], right: dict[str, Any]) -> None:
    """The same texts; log-probabilities but for rounding, which depends on what a request is batched with."""
    numbers: tuple[list[float], list[float]] = [], []
    one, other = (dict(sorted(each.items())) for each in (found, right))
    assert without_numbers(one, numbers[0]) == without_numbers(other, numbers[1])
    assert numbers[1] and np.allclose(*numbers, atol=1e-4)


def test_texts_are_those_of_one_ring(tmp_path: Path) -> None:
    """Four ranks as one ring, two and four; with latency within rings, little memory, and in two starts."""
    folder, source = make_checkpoint(tmp_path / "model"), tmp_path / "in.jsonl"
    write_requests(source, 90)
    base = [f"model.path={folder}", "model.dtype=float32", f"workload.source={source}", "output.checkpoint_s=0.05"]
    small = ["network.latency_ms=2", "kvcache.main_pages=24", "kvcache.swap_pages=4", "trace=true"]
    jobs = {
        "one": [],
        "two": ["pipeline.replicas=2", *small],
        "four": ["pipeline.replicas=4", "workload.limit=40"],
        "auto": ["pipeline.replicas=auto", "kvcache.share_prefixes=false"],
    }
    overrides = [[*base, *job, f"output.dir={tmp_path / name}"] for name, job in jobs.items()]
    overrides.append([*base, "pipeline.replicas=2", "workload.order=file", f"output.dir={tmp_path / 'four'}"])
    printed = run_jobs(4, overrides, tmp_path)
    truth = outcomes(tmp_path / "one")
    assert len(truth) == 90 and truth["r12"][0] == "unknown_parameter"
    for name in ("two", "four", "auto"):
        assert_same(outcomes(tmp_path / name), truth)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert len(metrics["stages"]) == 4 and metrics["plan"]["replicas"] == 2 and metrics["requests"] == 90
    rings = metrics["rings"]
    assert [ring["ranks"] for ring in rings] == [[0, 1], [2, 3]]
    answers_given = metrics["requests"] - metrics["errors"]
    assert sum(ring["requests"] for ring in rings) == answers_given and all(ring["requests"] for ring in rings)
    assert sum(ring["output_tokens"] for ring in rings) == metrics["output_tokens"]
    assert (tmp_path / "two" / "timeline.png").exists()
    assert "rings     ranks each" in printed and "ring 1 (ranks 2 to 3):" in printed


def test_a_killed_ring_and_a_stop_in_the_middle(tmp_path: Path) -> None:
    """SIGKILL of one of two rings, SIGTERM after the restart, and the rest by one ring: the texts are that one's."""
    folder, source, output = make_checkpoint(tmp_path / "model"), tmp_path / "in.jsonl", tmp_path / "out"
    write_requests(source, COUNT, longest=96)
    job = [f"model.path={folder}", "model.dtype=float32", f"workload.source={source}"]
    assert run_here(*job, f"output.dir={tmp_path / 'one'}") == 0
    truth = outcomes(tmp_path / "one")
    assert len(truth) == COUNT
    # Few sequences at once: the job lasts some seconds.
    slow = ["pipeline.rounds=2", "pipeline.micro_batch_size=1", "output.grace_s=0"]
    rings = ["pipeline.replicas=2", *slow, "output.checkpoint_s=0.05", f"output.dir={output}"]
    with running(torchrun_command(2, *job, *rings, restarts=1), output, tmp_path / "log") as started:
        started.until_answers(COUNT // 8)
        killed = started.kill_when(1, lambda: bool(unfinished(output) - outcomes(output).keys()))
        started.until(lambda: started.has_rank(1, before=killed))
        started.until_answers(line_count(output) + COUNT // 8)
        started.rank(1).terminate()
        assert started.wait() != 0
    stopped = json.loads((output / "metrics.json").read_text())
    assert stopped["stopped_by"].startswith("SIGTERM to rank 1 ") and stopped["resumed_tokens"] > 0
    assert len(outcomes(output)) < COUNT and unfinished(output)
    assert run_here(*job, f"output.dir={output}") == 0
    assert_same(outcomes(output), truth)
    assert json.loads((output / "metrics.json").read_text())["resumed_tokens"] > 0
    assert not (output / "unfinished.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "rings"),
    [
        (["memory_gb=40", "network.latency_ms=64"], 4),  # the model fits one rank: no ring needs a link
        (["memory_gb=10"], 2),  # it does not: two ranks hold it, and have room for all requests
        (["memory_gb=10", "kvcache.main_pages=2500"], 1),  # two do not hold as many pages
    ],
)
def test_as_many_rings_as_are_fastest(overrides: list[str], rings: int) -> None:
    job = ["ranks=4", "model=llama-3-8b", "workload.source=fixed64:64:0", "sampling.max_tokens=16"]
    printed = plan(load_plan_config([*job, "pipeline.replicas=auto", *overrides]))
    (chosen,) = (line for line in printed.splitlines() if line.endswith("<- chosen"))
    assert int(chosen.split()[0]) == rings


def test_numbers_of_rings_that_cannot_work() -> None:
    job = ["ranks=4", "model=llama-3-8b", "workload.source=fixed64:64:0", "sampling.max_tokens=16"]
    refused = {
        "pipeline.replicas=3 does not divide 4 ranks": ["pipeline.replicas=3"],
        "workload.concurrency=1 leaves some": ["pipeline.replicas=2", "workload.concurrency=1"],
        "comm.activations=fp8 codes": ["pipeline.replicas=4", "comm.activations=fp8", "network.latency_ms=1"],
    }
    for message, overrides in refused.items():
        with pytest.raises(UserError, match=message):
            plan(load_plan_config([*job, *overrides]))
    with pytest.raises(UserError, match=r"pipeline.replicas=0 must be auto or"):
        load_config(["pipeline.replicas=0"])
