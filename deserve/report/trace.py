"""Pictures of a run: `trace.json` for Perfetto, `timeline.png` for people."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from deserve.timeline import Span

# The tracks of a rank, and the kinds of span on each; a span on a later line of a track lies within an earlier one.
TRACKS = {
    "host": ("commit", "plan"),
    "stage": ("compute", "sample"),
    "link": ("receive", "held", "send"),
    "copies": ("swap in", "suspend", "resume"),
}
PICTURED_TURNS = 2.3  # of the ring, in timeline.png
IDLE, ROUND_GREY = "#f4f4f4", "#888888"
FEW = 8  # rounds that get colours of their own

Colour: TypeAlias = tuple[float, float, float]


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
                for span in sorted(spans, key=lambda span: (span.begin, -span.end))
                if span.kind in kinds
            )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def read_trace(path: Path) -> list[list[Span]]:
    """The spans of every rank that `write_trace` wrote to `path`."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    ranks: list[list[Span]] = [[] for _ in range(1 + max((event["pid"] for event in events), default=-1))]
    for event in events:
        begin, end = round(1e3 * event["ts"]), round(1e3 * (event["ts"] + event["dur"]))
        ranks[event["pid"]].append(Span(event["name"], event["args"]["micro-batch"], begin, end))
    return ranks


def draw_timeline(path: Path, ranks: Sequence[Sequence[Span]], title: str) -> None:
    """Draw some turns of the ring, as they usually are: a lane for each rank, a colour for each round."""
    draw_timelines(path, [(ranks, title)])


def draw_timelines(
    path: Path, runs: Sequence[tuple[Sequence[Sequence[Span]], str]], firsts: Sequence[int] | None = None
) -> None:
    """Draw runs (spans by rank, title) below each other, to the same scale. Each has ranks from its first one on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    windows = [steady_window(ranks) for ranks, _ in runs]
    length = max(end - begin for begin, end in windows)
    heights = [0.9 + 0.7 * len(ranks) for ranks, _ in runs]
    figure, axes = plt.subplots(
        len(runs), figsize=(12, 0.5 + sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    firsts = firsts or [0] * len(runs)
    for (ranks, title), (begin, _), one, first in zip(runs, windows, axes[:, 0], firsts, strict=True):
        draw_lanes(one, ranks, begin, begin + length, first)
        one.set_title(title, fontsize=11, loc="left")
    axes[-1, 0].set_xlabel("ms")
    handles: list[Any] = [Patch(color=ROUND_GREY, label="a visit: a colour for each round")]
    if len(runs) == 1:
        rounds = count_rounds(runs[0][0])
        colours = round_colours(rounds)
        shown = range(rounds) if rounds <= FEW else sorted({round(step * (rounds - 1) / 5) for step in range(6)})
        handles = [Patch(color=colours[index], label=f"round {index}") for index in shown]
    handles.append(Patch(facecolor=IDLE, edgecolor="#bbbbbb", hatch="////", label="idle"))
    handles.append(plt.Line2D([], [], color="#888888", lw=1, label="on the link"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_lanes(axes: Any, ranks: Sequence[Sequence[Span]], begin: int, end: int, first: int = 0) -> None:
    """What each rank computed from `begin` to `end` (ns), one lane below the other, and what went from rank to rank."""
    visits = [sorted((s for s in spans if s.kind == "compute"), key=lambda s: s.begin) for spans in ranks]
    rounds = count_rounds(ranks)
    colours = round_colours(rounds)
    width = (end - begin) / 1e6
    labels = []
    for lane, spans in enumerate(visits):
        axes.broken_barh([(0, width)], (lane - 0.3, 0.6), facecolors=IDLE, edgecolor="#dddddd", hatch="////", lw=0)
        busy = 0.0
        for index, span in enumerate(spans):
            if span.begin > end:
                break
            left, right = (min(max(at, begin), end) for at in (span.begin, span.end))
            where, wide = (left - begin) / 1e6, (right - left) / 1e6
            colour = colours[span.micro_batch]
            # Links are first in, first out: this is the same visit on the next rank.
            then = visits[lane + 1][index] if lane + 1 < len(visits) and index < len(visits[lane + 1]) else span
            if then.begin > max(begin, span.end):
                axes.plot(
                    [(span.end - begin) / 1e6, (then.begin - begin) / 1e6],
                    [lane + 0.3, lane + 0.7],
                    color=colour,
                    lw=1 if rounds <= FEW else 0.7,
                    alpha=0.9 if rounds <= FEW else 0.6,
                    zorder=1,
                )
            if right <= left:
                continue
            busy += right - left
            axes.broken_barh([(where, wide)], (lane - 0.3, 0.6), facecolors=[colour], zorder=2, lw=0)
            if wide > 0.014 * width:
                ink = "white" if sum(colour[:3]) < 1.7 else "black"
                text = str(span.micro_batch)
                axes.text(where + wide / 2, lane, text, ha="center", va="center", fontsize=8, color=ink, zorder=3)
        labels.append(f"rank {first + lane}\n{100 * (1 - busy / max(end - begin, 1)):.0f} % idle")
    axes.set_yticks(range(len(visits)), labels)
    axes.set_ylim(len(visits) - 0.6, -0.4)
    axes.set_xlim(0, width)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.tick_params(left=False)


def count_rounds(ranks: Sequence[Sequence[Span]]) -> int:
    """How many micro-batches the spans speak of."""
    return 1 + max((span.micro_batch for spans in ranks for span in spans), default=0)


def round_colours(rounds: int) -> list[Colour]:
    """A colour for each round: unlike ones for a few, a gradient for many."""
    import matplotlib

    name, places = ("Dark2", range(rounds)) if rounds <= FEW else ("turbo", np.linspace(0.02, 0.98, rounds))
    return [(red, green, blue) for red, green, blue, _ in map(matplotlib.colormaps[name], places)]


def steady_window(ranks: Sequence[Sequence[Span]]) -> tuple[int, int]:
    """Begin and end (ns) of some turns of the ring that begin with one of usual length in the middle of the run."""
    visits = [span for span in ranks[0] if span.kind == "compute"] if ranks else []
    if not visits:
        return 0, 1
    middle = visits[len(visits) // 5 : len(visits) - len(visits) // 5]
    begins = [span.begin for span in middle if span.micro_batch == middle[0].micro_batch]
    turns = sorted((after - begin, begin) for begin, after in pairwise(begins))
    turn, begin = turns[len(turns) // 2] if turns else (visits[-1].end - visits[0].begin, visits[0].begin)
    return begin, begin + max(1, round(PICTURED_TURNS * turn))
