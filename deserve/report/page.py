"""`report.html`: a run on one page that needs no network. `page.html` is its template, with the scripts that draw."""

import json
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from deserve import __version__
from deserve.report.files import replace_file
from deserve.report.progress import SAMPLED
from deserve.report.summary import closing_table
from deserve.report.trace import TRACKS, steady_window
from deserve.timeline import Span

MARK = "{{data}}"  # in the template
POINTS = 150  # of a curve, at most
MOST_SPANS = 30_000  # of the timeline, all ranks together: some 600 KB


def write_page(path: Path, metrics: dict[str, Any], ranks: Sequence[Sequence[Span]] = ()) -> None:
    """Write the page of `metrics` (those of `metrics.json`) and the spans of each of `ranks`. Raises OSError."""
    stages = [stage | {"history": curves(stage["history"], stage["elapsed_s"])} for stage in metrics["stages"]]
    data = {
        "version": __version__,
        "written": datetime.now().isoformat(" ", timespec="seconds"),
        "summary": closing_table(metrics),
        "metrics": metrics | {"history": curves(metrics["history"], metrics["elapsed_s"]), "stages": stages},
        "timeline": _timeline(ranks) if any(ranks) else None,
    }
    # Within a script element only "<" could begin markup: that of a closing tag, in a message that quotes a request.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("deserve.report").joinpath("page.html").read_text(encoding="utf-8")
    replace_file(path, template.replace(MARK, text).encode())


def curves(history: dict[str, list[float]], elapsed_s: float) -> dict[str, list[float]]:
    """Histories by second as means of at most `POINTS` stretches of time; `ends` has where each ends, in seconds.

    A stretch at the end that is less than half as long as the others belongs to the one before.
    """
    seconds = max(map(len, history.values()), default=0)
    length = max(1, -(-seconds // POINTS))
    begins = list(range(0, seconds, length))
    if len(begins) > 1 and elapsed_s - begins[-1] < length / 2:
        begins.pop()
    stops = [*begins[1:], seconds]
    ends = [*map(float, begins[1:]), elapsed_s]
    found = {"ends": [round(end, 2) for end in ends]}
    for name, values in history.items():
        found[name] = [
            round(sum(values[begin:stop]) / (stop - begin if name in SAMPLED else max(end - begin, 1e-3)), 4)
            for begin, stop, end in zip(begins, stops, ends, strict=True)
        ]
    return found


def _timeline(ranks: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Spans of each rank by kind, as micro-batch, begin and length (us) in turn: all, or as many of the run's middle.

    `view` (us) is what to show first, the turns of `timeline.png`.
    """
    first = min(span.begin for spans in ranks for span in spans)
    last = max(span.end for spans in ranks for span in spans)
    view = steady_window(ranks)
    share = min(1.0, MOST_SPANS / sum(map(len, ranks)))
    middle, half = sum(view) / 2, max(share * (last - first), view[1] - view[0]) / 2
    begin, end = (first, last) if share == 1 else (middle - half, middle + half)
    shown: list[dict[str, list[int]]] = []
    for spans in ranks:
        kinds: dict[str, list[int]] = {}
        for span in sorted(spans, key=lambda span: span.begin):
            if span.begin < end and span.end > begin:
                times = ((span.begin - first) // 1000, (span.end - span.begin) // 1000)
                kinds.setdefault(span.kind, []).extend((span.micro_batch, *times))
        shown.append(kinds)
    return {"tracks": TRACKS, "ranks": shown, "view": [(at - first) // 1000 for at in view]}
