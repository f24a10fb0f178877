"""Pictures of a run: `trace.json` for Perfetto, `timeline.png` for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deserve.report.timeline import Span

# The tracks of a rank, and the kinds of span on each; a span on a later line of a track lies within an earlier one.
TRACKS = {
    "stage": ("commit", "plan", "compute", "sample"),
    "link": ("receive", "held", "send"),
    "copies": ("swap in", "swap out", "suspend", "resume"),
}
PICTURED_TURNS = 2.5  # of the ring, in timeline.png


def write_trace(path: Path, ranks: Sequence[Sequence[Span]]) -> None:
    """Write the spans of every rank in the Chrome trace event format, times in microseconds since the first span.

    Source: "Trace Event Format", Google, 2016.
    """
    begin = min((span.begin for spans in ranks for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        for track, (name, kinds) in enumerate(TRACKS.items()):
            events.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": track, "args": {"name": name}})
            events.extend(
                {
                    "name": span.kind,
                    "cat": name,
                    "ph": "X",
                    "pid": rank,
                    "tid": track,
                    "ts": (span.begin - begin) / 1e3,
                    "dur": (span.end - span.begin) / 1e3,
                    "args": {"micro-batch": span.micro_batch},
                }
                for span in spans
                if span.kind in kinds
            )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def draw_timeline(path: Path, ranks: Sequence[Sequence[Span]], title: str) -> None:
    """Draw some turns of the ring from the middle of the run: a lane for each rank, a colour for each round.

    What is white is idle time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    begin, end = steady_window(ranks)
    rounds = 1 + max((span.micro_batch for spans in ranks for span in spans), default=0)
    colours = matplotlib.colormaps["turbo"]
    shade = [colours((index + 0.5) / rounds) for index in range(rounds)]
    figure, axes = plt.subplots(figsize=(12, 1.6 + 0.62 * len(ranks)), layout="constrained")
    idle = []
    for lane, spans in enumerate(ranks):
        busy = 0.0
        for span in spans:
            left, right = max(span.begin, begin), min(span.end, end)
            if span.kind != "compute" or right <= left:
                continue
            busy += right - left
            where, width = (left - begin) / 1e6, (right - left) / 1e6
            axes.broken_barh(
                [(where, width)], (lane - 0.36, 0.72), facecolors=[shade[span.micro_batch]], edgecolor="white", lw=0.6
            )
            if width > (end - begin) / 1e6 / 40:
                axes.text(where + width / 2, lane, str(span.micro_batch), ha="center", va="center", fontsize=8)
        idle.append(100 * (1 - busy / max(end - begin, 1)))
    axes.set_yticks(range(len(ranks)), [f"rank {rank}\n{share:.0f} % idle" for rank, share in enumerate(idle)])
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xlim(0, (end - begin) / 1e6)
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=11)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.tick_params(left=False)
    shown = list(range(rounds)) if rounds <= 12 else [0, rounds // 2, rounds - 1]
    handles = [Patch(color=shade[index], label=f"round {index}") for index in shown]
    handles.append(Patch(facecolor="white", edgecolor="grey", label="idle"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 13), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def steady_window(ranks: Sequence[Sequence[Span]]) -> tuple[int, int]:
    """Begin and end (ns) of a few turns of the ring in the middle of the run."""
    visits = [span for span in ranks[0] if span.kind == "compute"] if ranks else []
    if not visits:
        return 0, 1
    middle = len(visits) // 2
    first = visits[middle]
    again = [span.begin for span in visits[middle + 1 :] if span.micro_batch == first.micro_batch]
    turn = again[0] - first.begin if again else visits[-1].end - first.begin
    return first.begin, first.begin + max(1, round(PICTURED_TURNS * turn))
