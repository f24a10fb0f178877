"""What features cost: plain requests beside the same with a stop string, a JSON schema and log-probabilities each.

    python -m bench.features [--ranks 2] [--requests 320] [--repeat 3] [key=value ...]

Prints a Markdown table: output tokens/s and CPU seconds of all ranks per 1,000 output tokens, medians of the repeats,
which take turns so that a slow spell of the machine falls on all of them. Overrides go to DeServe.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OUTPUT = 64  # tokens
# Too many integers for an answer to end before its last token.
SCHEMA = {"type": "object", "properties": {"text": {"type": "array", "items": {"type": "integer"}, "minItems": OUTPUT}}}
SCHEMA |= {"required": ["text"], "additionalProperties": False}
FEATURES = {
    "plain": {"ignore_eos": True},
    "stop string": {"ignore_eos": True, "stop": ["###END###"]},
    "logprobs 5": {"ignore_eos": True, "logprobs": True, "top_logprobs": 5},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "numbers", "schema": SCHEMA}}},
}


def request(index: int, said: dict[str, object]) -> str:
    """A line of the input: a chat of some 60 tokens, which no two lines share."""
    text = f"Request {index}. Write down what you know of the number {index * index}, as long as you can. " * 2
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": OUTPUT} | said)


def run(ranks: int, requests: int, said: dict[str, object], overrides: list[str]) -> tuple[float, float]:
    """Output tokens/s, and CPU seconds per 1,000 output tokens from the start of the processes to their end."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        source.write_text("\n".join(request(index, said) for index in range(requests)))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "deserve.run"),
                *(f"workload.source={source}", f"output.dir={folder}/out", *overrides),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # shared out by the program
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = json.loads((Path(folder) / "out" / "metrics.json").read_text())
    assert not metrics["errors"], metrics["errors_by_code"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return metrics["output_tokens_per_s"], 1e3 * cpu / metrics["output_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in FEATURES}
    for _ in range(arguments.repeat):
        for name, said in FEATURES.items():
            figures[name].append(run(arguments.ranks, arguments.requests, said, arguments.overrides))
            print(f"{name}: {figures[name][-1][0]:.0f} tokens/s", file=sys.stderr, flush=True)
    base = statistics.median(rate for rate, _ in figures["plain"])
    print("| every line has | output tokens/s | of plain | CPU s per 1,000 tokens |\n| --- | --- | --- | --- |")
    for name, runs in figures.items():
        rate, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {rate:.0f} | {rate / base:.0%} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
