"""`metrics.json`: what a run did, in figures."""

import json
from pathlib import Path
from typing import Any

from deserve.report.files import replace_file
from deserve.stage import Stage
from deserve.timeline import Timeline


def stage_metrics(timeline: Timeline, stage: Stage) -> dict[str, Any]:
    """One rank's share of `metrics.json`: fractions of the time from its first to its last visit, and seconds.

    `history` has fractions of each second since its first visit. `compute_s` holds `sample_s` and what a rank without a
    copy stream spends on swapping.
    """
    elapsed = max(timeline.elapsed_s, 1e-9)
    totals = timeline.totals
    busy = totals["compute"] / elapsed
    return {
        "busy": busy,
        "bubble": max(0.0, 1 - busy),
        "visits": timeline.counts["compute"],
        "elapsed_s": elapsed,
        "compute_s": totals["compute"],
        "sample_s": totals["sample"],
        "plan_s": totals["plan"] + totals["commit"],
        "receive_s": totals["receive"],
        "held_by_simulated_network_s": totals["held"],
        "send_s": totals["send"],
        "swap_in_s": totals["swap in"],
        "swap_in_bytes": stage.swapping.bytes_in,
        "swap_out_bytes": stage.swapping.bytes_out,
        "waited_for_pages_s": stage.swapping.waited_s,
        "history": {kind: history.first(int(elapsed) + 1) for kind, history in timeline.history.items()},
    }


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics` as JSON. Raises OSError."""
    replace_file(path, json.dumps(metrics, indent=2).encode() + b"\n")
