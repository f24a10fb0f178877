"""A run to look at: report.html, and metrics for Prometheus while it runs."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from background import free_port
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT, run_here
from results import page_data

from deserve.errors import UserError
from deserve.report.exporter import Exporter
from deserve.report.page import MOST_SPANS, POINTS, curves, write_page
from deserve.report.sample import Sample
from deserve.timeline import SECOND, Span, Timeline

# A browser is no Python package, so the installation cannot bring one.
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
MARKUP = "</script><script>broken()</script>"
TINY = ["model=tiny", "device=cpu", "model.dtype=float32", "sampling.max_tokens=6", "sampling.ignore_eos=true"]
COUNTS = {"requests": 0, "sampled": 0, "trips": 0, "finish_reasons": {}, "errors": {}, "sample": Sample(), "total": 9}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run with errors, and what a scrape at its end said."""
    folder = tmp_path_factory.mktemp("watched")
    lines: list[dict[str, Any]] = [{"custom_id": f"row-{row}", "prompt": [5, 6, 7, row + 8]} for row in range(6)]
    lines += [
        {"custom_id": MARKUP, "prompt": [5], MARKUP: 1},
        {"custom_id": "hot", "prompt": [5], "temperature": "hot"},
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    port, scraped = free_port(), []
    with pytest.MonkeyPatch.context() as patch:
        close = Exporter.close

        def scrape_and_close(self: Exporter) -> None:
            scraped.append(urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
            close(self)

        patch.setattr(Exporter, "close", scrape_and_close)
        overrides = [f"workload.source={folder / 'in.jsonl'}", f"output.dir={folder}", f"report.metrics_port={port}"]
        assert run_here(*TINY, *overrides, "trace=true") == 0
    with pytest.raises(OSError):
        urlopen(f"http://127.0.0.1:{port}/metrics")
    return folder, scraped[0]


def test_the_page_carries_the_run_and_nothing_of_it_is_markup(run: tuple[Path, str]) -> None:
    folder, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    data = page_data(folder / "report.html")
    assert MARKUP not in (folder / "report.html").read_text()
    errors = data["metrics"]["errors_by_code"]
    assert errors == metrics["errors_by_code"] and len(errors) == 2
    assert [found["custom_id"] for found in errors.values() if MARKUP in found["first"]] == [MARKUP]
    assert data["metrics"]["config"] == metrics["config"] and MARKUP in data["summary"]
    (kinds,) = data["timeline"]["ranks"]
    assert len(kinds["compute"]) == 3 * metrics["stages"][0]["visits"]
    past = data["metrics"]["history"]
    assert {len(values) for values in past.values()} == {len(past["ends"])}
    assert max(past["kv_use"]) <= 1 and sum(metrics["history"]["admitted_tokens"]) == 6 * 4


def test_the_page_loads_nothing() -> None:
    template = (ROOT / "deserve" / "report" / "page.html").read_text()
    assert "default-src 'none'" in template and "innerHTML" not in template
    assert set(re.findall(r"https?://[\w./]+", template)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\ssrc=|\shref=|@import|url\(", template)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium-headless-shell")
def test_a_browser_draws_the_page(run: tuple[Path, str]) -> None:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{run[0]}/report.html"], capture_output=True, text=True, timeout=120)
    drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert "<title>tiny: report of a run</title>" in drawn and "cannot be drawn" not in drawn
    titles = re.findall(r"<h2>(.*?)</h2>", drawn)
    assert {"Throughput", "Ranks", "Errors", "Plan and measurement", "Timeline"} <= set(titles)
    assert MARKUP.replace("<", "&lt;").replace(">", "&gt;") in drawn
    assert MARKUP not in drawn
    assert "ms shown" in drawn


def test_a_page_that_cannot_be_written_costs_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").mkdir()
    assert run_here(*TINY, "workload.source=fixed3:8:2", f"output.dir={tmp_path}") == 0
    said = capfd.readouterr()
    assert f"{tmp_path / 'report.html'} cannot be written: Is a directory" in said.err
    assert f"what the run did in {tmp_path / 'metrics.json'}" in said.out
    assert (tmp_path / "results.jsonl").read_bytes().count(b"\n") == 3
    assert not (tmp_path / "report.tmp").exists()


def test_a_run_without_visits_or_with_little_in_its_metrics_has_a_page(run: tuple[Path, str], tmp_path: Path) -> None:
    metrics = json.loads((run[0] / "metrics.json").read_text())
    write_page(tmp_path / "report.html", metrics, [[], []])
    assert page_data(tmp_path / "report.html")["timeline"] is None


def test_of_a_long_timeline_the_middle_is_shown(run: tuple[Path, str], tmp_path: Path) -> None:
    metrics = json.loads((run[0] / "metrics.json").read_text())
    count = 2 * MOST_SPANS
    ranks = [[Span("compute", visit % 4, visit * 10_000, visit * 10_000 + 8_000) for visit in range(count)]] * 2
    write_page(tmp_path / "report.html", metrics, ranks)
    timeline = page_data(tmp_path / "report.html")["timeline"]
    for kinds in timeline["ranks"]:
        begins = kinds["compute"][1::3]
        assert MOST_SPANS / 2 - 4 <= len(begins) <= MOST_SPANS / 2 + 4
        assert begins[0] <= timeline["view"][0] < timeline["view"][1] <= begins[-1]


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=3000),
    st.floats(0.01, 1),
)
def test_curves_lose_nothing(values: list[int], part: float) -> None:
    elapsed = len(values) - 1 + part
    found = curves({"output_tokens": values, "kv_use": [0.5] * len(values)}, elapsed)
    ends = found["ends"]
    assert len(ends) <= POINTS and ends == sorted(ends) and ends[-1] == pytest.approx(elapsed, abs=0.01)
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    total = sum(rate * length for rate, length in zip(found["output_tokens"], lengths, strict=True))
    assert total == pytest.approx(sum(values), rel=0.01, abs=elapsed * 0.02) or elapsed < 1
    assert set(found["kv_use"]) == {0.5}


def test_busy_seconds_are_shared_out() -> None:
    timeline = Timeline(keep=True)
    timeline.add("receive", 0, 5 * SECOND, 5 * SECOND + SECOND // 4)
    timeline.add("compute", 0, 5 * SECOND + SECOND // 2, 7 * SECOND + SECOND // 2)
    timeline.add("plan", 0, 8 * SECOND, 9 * SECOND)
    assert timeline.history["compute"].first(4) == [0.5, 1, 0.5, 0]
    assert timeline.spans[1] == Span("compute", 0, 5 * SECOND + SECOND // 2, 7 * SECOND + SECOND // 2)
    assert timeline.history["receive"].first(2) == [0.25, 0] and set(timeline.history) == {"compute", "receive"}


def test_prometheus_reads_what_the_run_did(run: tuple[Path, str]) -> None:
    values = dict(re.findall(r"^(\S+?)(?:_total)?\{.*\} (\S+)$", run[1], re.M))
    expected = {
        "vllm:prompt_tokens": 24,
        "vllm:generation_tokens": 36,
        "vllm:request_success": 6,
        "vllm:num_requests_running": 0,
        "vllm:kv_cache_usage_perc": 0,
        "deserve:requests": 8,
    }
    assert {name: float(values[name]) for name in expected} == expected
    assert 'deserve:request_errors_total{code="invalid_value",model_name="tiny"} 1.0' in run[1]
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 6.0' in run[1]
    assert float(values["deserve:visits"]) > 0 and 'deserve:rank_seconds_total{kind="compute"' in run[1]


def test_a_port_that_is_taken_is_said_before_the_first_visit(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"report.metrics_port={port} .* Address already in use. Give another port"
        ):
            run_here(*TINY, f"output.dir={tmp_path}", f"report.metrics_port={port}")
    assert not (tmp_path / "metrics.json").exists()
    with pytest.raises(UserError, match=r"report\.metrics_host=no\.such\.host\.invalid"):
        Exporter("no.such.host.invalid", 1, "tiny", dict)


def test_the_dashboard_and_the_documentation_name_metrics_that_there_are() -> None:
    exporter = Exporter("127.0.0.1", free_port(), "tiny", lambda: COUNTS)
    try:
        exporter.predicted = 1.0
        known = {f"{metric.name}{'_total' * (metric.type == 'counter')}" for metric in exporter.collect()}
    finally:
        exporter.close()
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    named = {name for query in queries for name in re.findall(r"(?:vllm|deserve):\w+", query)}
    assert len(queries) >= 8 and named <= known
    assert set(re.findall(r"`((?:vllm|deserve):\w+)`", (ROOT / "docs" / "report.md").read_text())) == known
