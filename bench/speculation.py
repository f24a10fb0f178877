"""What draft tokens bring, by the kind of work: the rate with `speculation.tokens=auto` over that with 0.

    python -m bench.speculation [--ranks 2] [--pairs 3] [--requests 48] [--only WORK] [key=value ...]

Runs of the two alternate; the table has medians. The texts of both must be equal where the model computes in float32.
Without overrides: SmolLM2 in float32, 64 ms between two ranks, 8 requests in flight. Were all in flight at once, the
answer with the fewest right drafts would set the time.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOB = [
    "model=smollm2-135m",
    "model.dtype=float32",
    "network.latency_ms=64",
    "output.resume=false",
    "workload.concurrency=8",
]
NAMES = ["Ada", "Boris", "Chloe", "Elif", "Farid", "Greta", "Hugo", "Ines", "Kira", "Liam", "Mona", "Olga", "Pablo"]
TOWNS = ["Aarhus", "Bergen", "Cadiz", "Dresden", "Essen", "Faro", "Ghent", "Haifa", "Izmir", "Jena"]
TRADES = ["baker", "teacher", "nurse", "pilot", "clerk", "carpenter", "printer"]
TOPICS = ["rain", "bees", "glass", "salt", "tides", "bread", "rust", "sleep", "maps", "wool", "ice", "clocks", "paper"]
ASKED = ["How does {} work?", "Why is {} important?", "Tell me something surprising about {}.", "Who discovered {}?"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "town": {"type": "string", "maxLength": 20},
        "born": {"type": "integer", "minimum": 1800, "maximum": 2020},
        "trade": {"enum": TRADES},
    },
    "required": ["name", "town", "born", "trade"],
    "additionalProperties": False,
}


def facts(chance: random.Random, count: int) -> str:
    """Sentences about people, no two alike."""
    return " ".join(
        f"{chance.choice(NAMES)} moved to {chance.choice(TOWNS)} in {chance.randint(1900, 2020)} and worked there as a "
        f"{chance.choice(TRADES)} for {chance.randint(2, 30)} years."
        for _ in range(count)
    )


def rewriting(number: int, chance: random.Random) -> dict[str, Any]:
    return chat(f"Repeat the following text exactly, word by word:\n\n{facts(chance, 4)}", 128)


def schemas(number: int, chance: random.Random) -> dict[str, Any]:
    form = {"json": SCHEMA, "disable_any_whitespace": True}
    content = f"Fill the form with what this says of the first person: {facts(chance, 2)}"
    return chat(content, 96, structured_outputs=form)


def duplicates(number: int, chance: random.Random) -> dict[str, Any]:
    """Of each topic 20 questions that differ in a word or two."""
    polite = ["", "Please. ", "Hello! ", "Quick question: ", "One more: "][number % 5]
    return chat(polite + ASKED[number // 5 % 4].format(TOPICS[number // 20 % len(TOPICS)]), 96)


def open_questions(number: int, chance: random.Random) -> dict[str, Any]:
    topics = chance.sample(TOPICS, 2)
    return chat(f"Write a few lines about {topics[0]} and {topics[1]}, as {chance.choice(NAMES)} would.", 96, hot=True)


def chat(content: str, most: int, hot: bool = False, **said: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": most,
        "temperature": 0.8 if hot else 0,
        **said,
    }


KINDS: dict[str, Callable[[int, random.Random], dict[str, Any]]] = {
    "rewriting a given text": rewriting,
    "JSON by schema": schemas,
    "near-duplicate questions": duplicates,
    "open questions, hot": open_questions,
}


def run(ranks: int, source: Path, folder: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The metrics and the texts of a job."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "deserve.run", *JOB, *overrides, f"workload.source={source}", f"output.dir={folder}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    entries = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    texts = {entry["custom_id"]: entry["response"]["body"]["choices"][0]["message"]["content"] for entry in entries}
    return json.loads((folder / "metrics.json").read_text()), texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--only", default="", help="the work whose name begins so")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    print("work                      without     with  ratio  tokens a trip  right of drafted  equal texts", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for kind, make in KINDS.items():
            if not kind.startswith(arguments.only):
                continue
            source = Path(name) / "in.jsonl"
            lines = [make(number, random.Random(number)) for number in range(arguments.requests)]
            source.write_text(
                "".join(json.dumps(line | {"custom_id": str(at)}) + "\n" for at, line in enumerate(lines))
            )
            rates: dict[str, list[float]] = {"0": [], "auto": []}
            texts: dict[str, dict[str, str]] = {}
            for _ in range(arguments.pairs):
                for tokens, measured in rates.items():  # one folder for each, so both keep their survey
                    overrides = [*arguments.overrides, f"speculation.tokens={tokens}"]
                    metrics, texts[tokens] = run(arguments.ranks, source, Path(name) / tokens, overrides)
                    measured.append(metrics["output_tokens_per_s"])
            without, drafted = (statistics.median(measured) for measured in rates.values())
            report = metrics["speculation"]
            equal = sum(texts["0"][key] == text for key, text in texts["auto"].items())
            right = f"{report['right']:6,} of {report['drafted']:6,}"
            print(
                f"{kind:<25} {without:7,.1f}  {drafted:7,.1f}  {drafted / without:5.2f}"
                f"  {report['tokens_per_trip']:13.2f}  {right}  {equal} of {len(lines)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
