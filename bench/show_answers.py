"""Prints some answers of a finished run, its throughput and its files: `python bench/show_answers.py OUTPUT_DIR`."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from deserve.report.results import failure

SHOWN = 3


def main(folder: Path) -> None:
    """Show the run in `folder`: the first answers in the order of the input, then the figures."""
    metrics = json.loads((folder / "metrics.json").read_text())
    # Of several lines of a request the last one counts.
    answers = {entry["custom_id"]: entry for entry in read_lines(folder / "results.jsonl")}
    shown = 0
    for entry in read_lines(Path(metrics["config"]["workload"]["source"])):
        answer = answers.get(entry.get("custom_id"))
        if shown == SHOWN or answer is None or failure(answer) is not None:
            continue
        shown += 1
        choice = answer["response"]["body"]["choices"][0]
        print(f"\n{indented('> ', question(entry.get('body', entry)))}")
        said = choice["message"] if "message" in choice else {"content": choice["text"]}
        print(indented("  ", said["content"] or json.dumps(said.get("tool_calls", ""))))
    print(
        f"\n{metrics['requests']} requests, {metrics['errors']} errors, {metrics['output_tokens']} output tokens in "
        f"{metrics['elapsed_s']:.1f} s: {metrics['output_tokens_per_s']:.1f} output tokens/s"
    )
    print(f"answers: {folder / 'results.jsonl'}\nfigures: {folder / 'metrics.json'}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def question(body: dict[str, Any]) -> str:
    """What a request asks: its last message, or its prompt."""
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


def indented(mark: str, text: str) -> str:
    """`text` wrapped at 100 columns, its first line after `mark`, the others as far in."""
    lines = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, 96) or [""]]
    return textwrap.indent("\n".join(lines), " " * len(mark)).replace(" " * len(mark), mark, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
