"""Traces and what stands beside them: spans, clocks, pictures, progress, the closing table."""

import io
import json
import queue
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import run_jobs
from results import page_data

from deserve.batch import Completion, Request
from deserve.comm.host import Host
from deserve.comm.link import Loopback
from deserve.comm.world import World
from deserve.report import progress as progress_module
from deserve.report.clock import shifted, to_rank_0s_clock
from deserve.report.progress import Progress, clock
from deserve.report.summary import bound, closing_table
from deserve.report.trace import TRACKS, draw_timeline, draw_timelines, read_trace, steady_window, write_trace
from deserve.timeline import Span, Timeline

LATENCY_MS = 20
PNG = b"\x89PNG"


@pytest.fixture(scope="session")
def traced(tmp_path_factory) -> Path:
    """The folder of a run of two ranks whose pages do not suffice without swapping."""
    folder = tmp_path_factory.mktemp("traced")
    overrides = ["workload.source=fixed24:32:0", "sampling.max_tokens=16", "sampling.ignore_eos=true"]
    overrides += ["pipeline.rounds=3", "kvcache.main_pages=12", "kvcache.swap_pages=12", f"output.dir={folder}"]
    overrides += [f"network.latency_ms={LATENCY_MS}", "model=tiny", "trace=true", "device=cpu", "warmup_s=0.1"]
    (folder / "stdout").write_text(run_jobs(2, [overrides], folder))
    return folder


def test_trace_is_what_perfetto_reads(traced: Path) -> None:
    trace = json.loads((traced / "trace.json").read_text())
    assert trace["displayTimeUnit"] == "ms"
    tracks = defaultdict(list)
    names = {}
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["ph"] in "MX"
        if event["ph"] == "M":
            names[event["name"], event["pid"], event["tid"]] = event["args"]["name"]
        else:
            assert event["ts"] >= 0 and event["dur"] >= 0 and 0 <= event["args"]["micro-batch"] < 3
            tracks[event["pid"], event["tid"]].append(event)
    for rank in range(2):
        assert names["process_name", rank, 0] == f"rank {rank}"
        assert [names["thread_name", rank, tid] for tid in range(len(TRACKS))] == list(TRACKS)
    for (_, tid), events in tracks.items():
        assert {event["name"] for event in events} <= set(list(TRACKS.values())[tid])
        begins = [event["ts"] for event in events]
        assert begins == sorted(begins)
        check_nesting(events)


def check_nesting(events: list[dict]) -> None:
    """Spans of a track lie beside or within each other, never across."""
    open_until: list[float] = []
    for event in events:
        while open_until and open_until[-1] <= event["ts"] + 1e-6:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1] + 1e-6, event
        open_until.append(end)


def test_every_part_of_a_visit_is_there(traced: Path) -> None:
    ranks = read_trace(traced / "trace.json")
    stages = json.loads((traced / "metrics.json").read_text())["stages"]
    kinds = [{span.kind for span in spans} for spans in ranks]
    both = {"compute", "receive", "send", "swap in"}
    # What a busy machine delivers late, the simulated network need not hold; and whether memory runs so short that
    # sequences are suspended is for the plan to say, which depends on measured times.
    maybe = {"held", "suspend", "resume"}
    assert kinds[0] - maybe == both | {"plan", "commit"} and kinds[1] - maybe == both | {"sample"}
    assert "held" in kinds[0] | kinds[1]
    for spans, stage in zip(ranks, stages, strict=True):
        computed = [span for span in spans if span.kind == "compute"]
        assert len(computed) == stage["visits"] == stages[0]["visits"]
        seconds = sum(span.end - span.begin for span in computed) / 1e9
        assert seconds == pytest.approx(stage["compute_s"], rel=1e-3)
        assert stage["swap_in_s"] > 0 and stage["swap_out_bytes"] > 0


def test_all_ranks_tell_time_by_one_clock(traced: Path) -> None:
    first, second = ([span for span in spans if span.kind == "compute"] for spans in read_trace(traced / "trace.json"))
    for here, there in zip(first, second, strict=True):
        assert here.micro_batch == there.micro_batch
        assert there.begin - here.end >= LATENCY_MS * 1e6


def test_the_page_has_the_timeline_of_both_ranks(traced: Path) -> None:
    data = page_data(traced / "report.html")
    metrics = json.loads((traced / "metrics.json").read_text())
    for kinds, stage in zip(data["timeline"]["ranks"], metrics["stages"], strict=True):
        assert sum(kinds["compute"][2::3]) / 1e6 == pytest.approx(stage["compute_s"], rel=0.02)
        assert sum(stage["history"]["compute"]) == pytest.approx(stage["compute_s"], rel=0.02)
    assert data["summary"] in (traced / "stdout").read_text()


def test_pictures(traced: Path, tmp_path: Path) -> None:
    assert (traced / "timeline.png").read_bytes().startswith(PNG)
    ranks = read_trace(traced / "trace.json")
    draw_timelines(tmp_path / "two.png", [(ranks, "once"), (ranks, "and again")])
    draw_timeline(tmp_path / "nothing.png", [[], []], "no visits")
    for rounds in (1, 9, 200):
        spans = [Span("compute", visit % rounds, visit * 10, visit * 10 + 8) for visit in range(3 * rounds)]
        draw_timeline(tmp_path / f"{rounds}.png", [spans] * 3, f"{rounds} rounds")
        assert (tmp_path / f"{rounds}.png").read_bytes().startswith(PNG)


def test_the_picture_shows_usual_turns() -> None:
    lengths = [500] + [100] * 20 + [500]  # the beginning and the end are unlike the rest
    begins = np.cumsum([0, *lengths]).tolist()
    spans = [Span("compute", 0, begin, begin + 50) for begin in begins]
    begin, end = steady_window([spans])
    assert 500 <= begin < 2500 and 200 <= end - begin <= 300


def test_trace_survives_writing_and_reading(tmp_path: Path) -> None:
    ranks = [[Span("compute", 0, 1000, 2500), Span("send", 0, 2500, 2501)], [Span("compute", 0, 3000, 4000)]]
    write_trace(tmp_path / "trace.json", ranks)
    assert read_trace(tmp_path / "trace.json") == [shifted(spans, -1000) for spans in ranks]


def test_nothing_is_kept_unless_asked_for() -> None:
    for keep in (False, True):
        timeline = Timeline(keep)
        link = Loopback()
        link.send(torch.zeros(4))
        with timeline.on_device("compute", 1), timeline.span("sample", 1):
            timeline.receive(link, 1)
        timeline.finish()
        assert [span.kind for span in timeline.spans] == ["receive", "sample", "compute"] * keep
        assert timeline.counts["compute"] == 1 and timeline.totals["compute"] > 0


class ThreadWorld(World):
    """A rank that is a thread: what is sent lies in queues, by sender and receiver, that all ranks share."""

    def __init__(self, rank: int, hosts: list[Host], mail: dict[tuple[int, int], queue.Queue[object]]):
        self.rank, self.size, self.hosts, self._mail = rank, len(hosts), hosts, mail

    def send(self, rank: int, key: str, value: object) -> None:
        self._mail[self.rank, rank].put((key, value))

    def receive(self, rank: int, key: str) -> object:
        found, value = self._mail[rank, self.rank].get(timeout=30)
        assert found == key
        return value


def test_hosts_with_clocks_of_their_own() -> None:
    names, ahead = ["a", "a", "b", "b", "c"], {"a": 0, "b": 7_000_000_000, "c": -3_000_000_000}
    hosts = [Host(f"boot of {name}", name) for name in names]
    mail: dict[tuple[int, int], queue.Queue[object]] = defaultdict(queue.Queue)
    found: dict[int, int] = {}

    def rank_(rank: int) -> None:
        world = ThreadWorld(rank, hosts, mail)
        found[rank] = to_rank_0s_clock(world, lambda: time.monotonic_ns() + ahead[names[rank]])

    threads = [threading.Thread(target=rank_, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [found[rank] for rank in (0, 1)] == [0, 0]
    for rank in (2, 3, 4):
        assert abs(found[rank] + ahead[names[rank]]) < 50e6


def completion(prompt: int, answer: int) -> Completion:
    return Completion(Request("", np.zeros(prompt, np.int32)), np.zeros(answer, np.int32), "length")


def test_progress_counts(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(4, warmup_s=10, stream=stream)
    progress.start()
    for second in range(41):
        now[0] = 100.0 + second
        progress.tokens(20, 20)
        if second % 10 == 5:
            progress.request(completion(100, 200))
    progress.request(error=("third", "invalid_value", "line 3: wrong"))
    progress.close()
    summary = progress.summary()
    assert (summary["requests"], summary["errors"]) == (5, 1)
    assert (summary["input_tokens"], summary["output_tokens"]) == (400, 800)
    assert summary["output_tokens_per_s"] == 20 and summary["total_tokens_per_s"] == 30
    after = summary["after_warmup"]
    assert (after["requests"], after["input_tokens"], after["output_tokens"]) == (4, 300, 31 * 20)
    assert after["elapsed_s"] == 30
    assert summary["history"]["output_tokens"] == [20] * 41
    assert sum(summary["history"]["requests"]) == 5 and sum(summary["history"]["input_tokens"]) == 400
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 6  # start, every ten seconds, end
    assert lines[0] == "deserve: 0/4 requests, 0 tok/s now, 0 overall"
    assert lines[2] == "deserve: 2/4 requests, 20 tok/s now, 21 overall, 0:16 left"


def test_nobody_knows_when_the_last_long_answer_ends() -> None:
    stream = io.StringIO()
    progress = Progress(2, warmup_s=0, stream=stream)
    progress.start()
    progress.request(completion(1, 2))
    progress.tokens(9, 9)
    progress.close()
    assert "1/2 requests" in stream.getvalue() and "left" not in stream.getvalue()


def test_progress_is_one_line_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(4, warmup_s=0, stream=stream)
    progress.start()
    progress.request(completion(10, 20))
    progress.tokens(20, 20)
    progress.close()
    assert "requests" in stream.getvalue() and "\n" not in stream.getvalue()


def test_time_left_reads_like_a_clock() -> None:
    assert [clock(seconds) for seconds in (5, 65.4, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_metrics_and_closing_table(traced: Path) -> None:
    metrics = json.loads((traced / "metrics.json").read_text())
    counts = {"requests", "errors", "input_tokens", "output_tokens", "elapsed_s"}
    rates = {"output_tokens_per_s", "total_tokens_per_s"}
    assert counts | rates <= metrics.keys() and metrics["after_warmup"].keys() == counts | rates
    assert metrics["output_tokens"] == 24 * 16 == sum(metrics["history"]["output_tokens"])
    assert {"busy", "bubble", "swap_in_bytes", "swap_out_bytes"} <= metrics["stages"][0].keys()
    assert metrics["plan"]["predicted_output_tokens_per_s"] > 0 and metrics["config"]["model"]["name"] == "tiny"
    table = closing_table(metrics)
    assert table in (traced / "stdout").read_text()
    for words in ("output tokens/s", "busy", "bound by", "predicted"):
        assert words in table
    thin = metrics["plan"] | {"bound": "link bandwidth", "hint": "comm.activations=fp8 would bring 1.9 times as much"}
    for busy in (0.2, 0.9):  # if it was busy after all, that is no news
        stages = [stage | {"busy": busy, "plan_s": 0, "send_s": 0} for stage in metrics["stages"]]
        assert (thin["hint"] in closing_table(metrics | {"plan": thin, "stages": stages})) == (busy < 0.5)
    assert "as long as max_tokens" not in table and "ignore" not in table and "were cut" not in table
    metrics["errors_by_code"] = {"invalid_value": {"count": 1200, "first": 'line 3: temperature is "hot"'}}
    assert '\n1,200 invalid_value, the first: line 3: temperature is "hot"\n' in closing_table(metrics)
    metrics |= {"ignored_keys": {"n": 1200, "answer": 2}, "cut_by_default_max_tokens": 7}
    assert "unknown_keys=ignore: answer (2 times), n (1,200 times)\n" in closing_table(metrics)
    assert "7 answers were cut at sampling.max_tokens=16, the default" in closing_table(metrics)
    assert metrics["plan"]["predicted_for_these_answers"] is None
    metrics["max_output_tokens"] *= 2
    metrics["plan"]["predicted_for_these_answers"] = 12.3
    words = "for answers as long as max_tokens allows; they ended at 50 % of it, for which it would have been 12.3"
    assert words in closing_table(metrics)


def test_what_bound_the_run() -> None:
    idle = {"busy": 0.2, "elapsed_s": 10.0, "receive_s": 7.0, "plan_s": 0.5, "send_s": 0.5}
    assert bound([idle, {**idle, "busy": 0.9}], "KV memory").startswith("compute: rank 1 was busy for 90 %")
    assert bound([{**idle, "busy": 0.5, "plan_s": 4.0}], "compute").startswith("host work: rank 0")
    assert bound([{**idle, "busy": 0.84, "plan_s": 0.2}], "compute").startswith("compute (the busiest, rank 0, waited")
    assert bound([idle, idle], "link latency").startswith("link latency (the busiest, rank 0, waited")
