"""The closing table: what a run brought, where each rank's time went, and what kept it from being more."""

from typing import Any

from deserve.scheduler.drafts import SOURCES

MOST_CODES, MESSAGE = 5, 160  # of errors shown, and characters of a message
FULL = 0.85  # of a rank's time: more is hardly to be had


def closing_table(metrics: dict[str, Any]) -> str:
    """`metrics` (those of `metrics.json`) for the eye."""
    answered, errors = metrics["requests"], metrics["errors"]
    lines = [
        f"{answered:,} request{'s' * (answered != 1)} ({errors} errors) in {metrics['elapsed_s']:.1f} s: "
        f"{metrics['output_tokens_per_s']:,.1f} output tokens/s "
        f"({metrics['output_tokens']:,}), {metrics['total_tokens_per_s']:,.1f} with prompts "
        f"({metrics['input_tokens']:,})"
    ]
    by_code = sorted(metrics["errors_by_code"].items(), key=lambda item: -item[1]["count"])
    for code, of_code in by_code[:MOST_CODES]:
        lines.append(f"{of_code['count']:,} {code}, the first: {of_code['first'][:MESSAGE]}")
    if metrics["cached_tokens"]:
        evicted = metrics["memory_pressure"]["evicted_prefix_pages"]
        lines.append(
            f"{metrics['cached_tokens']:,} prompt tokens ({metrics['prefix_hit_rate']:.1%}) were shared, not computed"
            + (f"; {evicted:,} pages of prefixes were evicted" if evicted else "")
        )
    non_finite = metrics["non_finite_logits"]
    if non_finite["requests"]:
        lines.append(f"{non_finite['requests']:,} requests ended with NaN or infinite logits in {non_finite['remedy']}")
    if metrics["ignored_keys"]:
        keys = ", ".join(
            f"{key} ({'once' if count == 1 else f'{count:,} times'})"
            for key, count in sorted(metrics["ignored_keys"].items())
        )
        lines.append(f"ignored, as workload.unknown_keys=ignore: {keys}")
    if cut := metrics["cut_by_default_max_tokens"]:
        default = metrics["config"]["sampling"]["max_tokens"]
        lines.append(
            f"{cut:,} {'answer was' if cut == 1 else 'answers were'} cut at sampling.max_tokens={default}, the default "
            "for requests that state no max_tokens: raise it, or set it to null for the end of the context"
        )
    after = metrics["after_warmup"]
    if metrics["warmup_s"]:
        lines.append(
            f"after {metrics['warmup_s']:g} s of warm-up: {after['output_tokens_per_s']:,.1f} output tokens/s, "
            f"{after['total_tokens_per_s']:,.1f} with prompts"
        )
    earlier = metrics["earlier_starts"]
    if earlier["results"] or earlier["errors_tried_again"]:
        lines.append(
            f"{earlier['results']:,} requests had results from earlier starts, and "
            f"{earlier['errors_tried_again']:,} errors of earlier starts were tried again"
        )
    if metrics["resumed_tokens"]:
        lines.append(
            f"{metrics['resumed_tokens']:,} tokens of {metrics['resumed_answers']:,} answers that earlier starts had "
            "begun were kept, not sampled again"
        )
    lines.append("rank      busy  bubble  of it waiting  planning  sending   visits  swapped in, out")
    stages = metrics["stages"]
    for rank, stage in enumerate(stages):
        waits, plans, sends = (_share(stage, name) for name in ("receive_s", "plan_s", "send_s"))
        swapped = ", ".join(f"{stage[key] / 1e6:,.0f} MB" for key in ("swap_in_bytes", "swap_out_bytes"))
        lines.append(
            f"{rank:<6}  {_percent(stage['busy'])}  {_percent(stage['bubble'])}         {_percent(waits)}    "
            f"{_percent(plans)}   {_percent(sends)}  {stage['visits']:7,}  {swapped}"
        )
    if metrics["stragglers"]:
        lines.append(f"straggler: {metrics['stragglers']}; the next start gives it fewer layers, unless it recovers")
    pressure = metrics["memory_pressure"]
    if pressure["suspensions"]:
        lines.append(
            f"{pressure['suspensions']:,} times a sequence was suspended to the host pool, to make room or to change "
            f"rounds; {pressure['most_host_pages_used']:,} of {pressure['host_pool_pages']:,} pages were used at most"
        )
    plan = metrics["plan"]
    predicted = plan["predicted_output_tokens_per_s"]
    rings = metrics.get("rings", [])
    for number, ring in enumerate(rings):
        first, last = ring["ranks"][0], ring["ranks"][-1]
        ranks = f"ranks {first} to {last}" if last > first else f"rank {first}"
        rate = ring["output_tokens_per_s"]
        lines.append(f"ring {number} ({ranks}): {ring['requests']:,} requests, {rate:,.1f} output tokens/s")
        lines += tuning(ring["tuning"]) + speculation(ring["speculation"])
    if not rings:
        lines += tuning(metrics["tuning"]) + speculation(metrics["speculation"])
    bound_by = bound(stages, plan["bound"])
    lines.append(f"bound by {bound_by}")
    if plan["hint"] and bound_by.startswith(plan["bound"]):
        lines.append(plan["hint"])
    if predicted and metrics["output_tokens_per_s"]:
        measured = metrics["output_tokens_per_s"]
        off = 100 * (measured / predicted - 1)
        line = f"measured {measured:,.1f} output tokens/s, predicted {predicted:,.1f} ({off:+.0f} %)"
        length = metrics["output_tokens"] / max(1, metrics["max_output_tokens"])
        if length < 1:
            line += f" for answers as long as max_tokens allows; they ended at {_percent(length).strip()} of it"
            if plan["predicted_for_these_answers"]:
                line += f", for which it would have been {plan['predicted_for_these_answers']:,.1f}"
        lines.append(line)
    return "\n".join(lines)


def tuning(report: dict[str, Any]) -> list[str]:
    """What tuning did: a line, or none where the job was too short for it."""
    if not report["tried"]:
        return []
    tried = f"tuning tried {report['tried']} other ways to fill visits"
    if not report["moves"]:
        return [f"{tried}; none was faster"]
    began, ended = report["began"], report["ended"]
    changes = [f"{name} {began[name]} -> {ended[name]}" for name in began if began[name] != ended[name]]
    gains = ", ".join(f"{100 * move['gain']:+.0f} %" for move in report["moves"])
    return [f"{tried} and kept {len(report['moves'])} ({gains}): {', '.join(changes)}"]


def speculation(report: dict[str, Any] | None) -> list[str]:
    """What draft tokens did: a line, or none where there were none."""
    if report is None or not report["drafted"]:
        return []
    sources = ", ".join(
        f"{source['right']:,} of {source['drafted']:,} from {SOURCES[name]}"
        for name, source in report["by_source"].items()
    )
    return [f"{report['tokens_per_trip']:.2f} tokens a trip: draft tokens were right {sources}"]


def bound(stages: list[dict[str, Any]], planned: str) -> str:
    """What bound the run, by where its busiest rank spent its time; `planned` is what the planner expected."""
    rank = max(range(len(stages)), key=lambda index: stages[index]["busy"])
    stage = stages[rank]
    computed, hosted = stage["busy"], _share(stage, "plan_s") + _share(stage, "send_s")
    if computed >= FULL:
        return f"compute: rank {rank} was busy for {_percent(computed).strip()} of the time"
    if computed + hosted >= FULL and hosted > (1 - computed) / 2:  # most of the time in which it did not compute
        return f"host work: rank {rank} computed for {_percent(computed).strip()}, planned and sent for " + (
            f"{_percent(hosted).strip()} of the time"
        )
    waited = (
        f"the busiest, rank {rank}, waited for frames for {_percent(_share(stage, 'receive_s')).strip()} of the time"
    )
    return f"{planned or 'what the ranks waited for'} ({waited})"


def _share(stage: dict[str, Any], name: str) -> float:
    return stage[name] / max(stage["elapsed_s"], 1e-9)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:4.0f} %"
