"""One Markdown table, and a plot, from the metrics files of several runs.

    python -m bench.report [--png plot.png] "vLLM=outputs/vllm" "DeServe=outputs/a,outputs/b,outputs/c"

NAME=FOLDER (or metrics.json), or several with commas between: repeats, of which the median counts. Ratios are to the
first.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Metrics = dict[str, Any]


def read(place: str) -> Metrics:
    """The metrics in folder `place`, or in that file."""
    path = Path(place)
    metrics: Metrics = json.loads((path / "metrics.json" if path.is_dir() else path).read_text())
    return metrics


def middle(repeats: list[Metrics]) -> Metrics:
    """The repeat of median throughput (the lower of the two in the middle)."""
    rates = [metrics["output_tokens_per_s"] for metrics in repeats]
    return repeats[rates.index(statistics.median_low(rates))]


def table(runs: dict[str, list[Metrics]]) -> str:
    """`runs` (repeats by name) in Markdown."""
    lines = ["| | requests | tokens in, out | s | output tokens/s | with prompts | ratio | busy, by rank | plan |"]
    lines.append("| --- " * 9 + "|")
    first = middle(next(iter(runs.values())))["output_tokens_per_s"]
    for name, repeats in runs.items():
        metrics = middle(repeats)
        rates = [repeat["output_tokens_per_s"] for repeat in repeats]
        spread = f" ({min(rates):,.0f} to {max(rates):,.0f})" if len(rates) > 1 else ""
        plan = metrics["plan"]
        layout = "-"
        if plan:
            layout = f"{plan['rounds']} x {plan['micro_batch_size']}"
            layout += f", {plan['swap_pages']} swap pages" if plan["swap_pages"] else ""
        cells = [
            name,
            f"{metrics['requests']:,}" + (f" ({metrics['errors']} errors)" if metrics["errors"] else ""),
            f"{metrics['input_tokens']:,}, {metrics['output_tokens']:,}",
            f"{metrics['elapsed_s']:.1f}",
            f"{metrics['output_tokens_per_s']:,.1f}{spread}",
            f"{metrics['total_tokens_per_s']:,.1f}",
            f"{metrics['output_tokens_per_s'] / first:.2f}",
            ", ".join(f"{100 * stage['busy']:.0f} %" for stage in metrics["stages"]) or "-",
            layout,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, runs: dict[str, list[Metrics]]) -> None:
    """Bars of output tokens/s, the repeats as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1 + 0.45 * len(runs)), layout="constrained")
    for row, (name, repeats) in enumerate(runs.items()):
        rates = [metrics["output_tokens_per_s"] for metrics in repeats]
        axes.barh(row, statistics.median_low(rates), color="#1b9e77" if "DeServe" in name else "#bbbbbb", height=0.6)
        if len(rates) > 1:
            axes.plot(rates, [row] * len(rates), "k.", ms=4)
        axes.text(max(rates), row, f"  {statistics.median_low(rates):,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("output tokens/s")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER[,FOLDER...]")
    arguments = parser.parse_args()
    named = (run.partition("=") for run in arguments.runs)
    runs = {name: [read(place) for place in places.split(",")] for name, _, places in named}
    print(table(runs))
    if arguments.png:
        plot(arguments.png, runs)


if __name__ == "__main__":
    main()
