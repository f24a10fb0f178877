"""Throughput on a CPU: DeServe in one and two ranks beside transformers' batched `generate`, on the same requests.

    python -m bench.throughput [--requests 640] [--repeat 3] [key=value ...]

Prints a Markdown table; each figure is the median of the repeats, which take turns so that a slow spell of the machine
falls on all of them. Overrides go to DeServe.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTH = OUTPUT = 64  # tokens in and out


def deserve(ranks: int, requests: int, overrides: list[str]) -> float:
    """Output tokens/s of a run on `ranks` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        subprocess.run(
            [
                sys.executable,
                *launcher,
                *("-m", "deserve.run", f"workload.source=fixed{requests}:{LENGTH}:0", f"sampling.max_tokens={OUTPUT}"),
                *("sampling.ignore_eos=true", f"output.dir={folder}", *overrides),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # shared out by the program
        )
        return json.loads((Path(folder) / "metrics.json").read_text())["output_tokens_per_s"]


def transformers_generate(requests: int, batch: int) -> float:
    """Output tokens/s of `generate` on batches of `batch` prompts, on all cores."""
    import torch
    from transformers import AutoModelForCausalLM

    from deserve.model.smollm2 import ensure_smollm2

    model = AutoModelForCausalLM.from_pretrained(ensure_smollm2(), dtype=torch.bfloat16)
    prompts = torch.randint(0, model.config.vocab_size, (requests, LENGTH), generator=torch.Generator().manual_seed(0))

    def generate(ids: torch.Tensor, count: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, do_sample=False
        )

    generate(prompts[:batch], 2)
    begin = time.monotonic()
    for at in range(0, requests, batch):
        generate(prompts[at : at + batch], OUTPUT)
    return requests * OUTPUT / (time.monotonic() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128, help="prompts in a batch of transformers' generate")
    parser.add_argument("--only-generate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.only_generate:
        print(transformers_generate(arguments.requests, arguments.batch))
        return
    runs = {
        "DeServe, 1 rank, all cores": lambda: deserve(1, arguments.requests, arguments.overrides),
        "DeServe, 2 ranks": lambda: deserve(2, arguments.requests, arguments.overrides),
        # A quarter of the requests: it is slower, and its rate does not depend on their number.
        "transformers generate, all cores": lambda: generate_in_a_process(arguments.requests // 4, arguments.batch),
    }
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeat):
        for name, run in runs.items():
            figures[name].append(run())
            print(f"{name}: {figures[name][-1]:.0f}", file=sys.stderr, flush=True)
    base = statistics.median(figures["transformers generate, all cores"])
    print("| system | output tokens/s (median) | of generate | runs |\n| --- | --- | --- | --- |")
    for name, rates in figures.items():
        median = statistics.median(rates)
        print(f"| {name} | {median:.0f} | {median / base:.2f}x | {', '.join(f'{rate:.0f}' for rate in rates)} |")


def generate_in_a_process(requests: int, batch: int) -> float:
    """`transformers_generate` in a process of its own, so that it leaves no memory or threads behind."""
    command = [
        sys.executable,
        "-m",
        "bench.throughput",
        "--only-generate",
        "--requests",
        str(requests),
        "--batch",
        str(batch),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
