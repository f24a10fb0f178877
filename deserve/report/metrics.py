"""`metrics.json`: what a run did, in figures."""

import json
from pathlib import Path
from typing import Any

from deserve.comm.ring import Links
from deserve.report.timeline import Timeline


def stage_metrics(timeline: Timeline, links: Links) -> dict[str, Any]:
    """One rank's share of `metrics.json`: fractions of the time from its first to its last visit, and seconds."""
    elapsed = max(timeline.elapsed_s, 1e-9)
    busy = timeline.totals["compute"] / elapsed
    receivers = [link for link in (links.plans_in, links.hidden_in, links.tokens_in) if link is not None]
    return {
        "busy": busy,
        "bubble": max(0.0, 1 - busy),
        "visits": timeline.visits,
        "elapsed_s": elapsed,
        "compute_s": timeline.totals["compute"],
        "plan_s": timeline.totals["plan"],
        "receive_s": timeline.totals["receive"],
        "held_by_simulated_network_s": sum(link.held_s for link in receivers),
        "swap_in_bytes": 0,
        "swap_out_bytes": 0,
    }


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics` as JSON in one step: a reader never sees half a file."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(metrics, indent=2) + "\n")
    scratch.replace(path)
