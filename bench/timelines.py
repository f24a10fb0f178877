"""The picture of the README: a pipeline with as many rounds as ranks and the planned run, one below the other.

    python -m bench.timelines docs/images/latency-64ms.png [--ranks 2] [key=value ...]

The overrides are for both; without any: a small model of random weights, 64 ms, the same KV memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deserve.report.trace import draw_timelines, read_trace

# Alike layers on both ranks, and no large vocabulary on the last; memory for 33 sequences.
JOB = [
    "network.latency_ms=64",
    "model=tiny",
    "model.architecture={hidden_size: 512, intermediate_size: 1536, num_hidden_layers: 16, num_attention_heads: 8,"
    " num_key_value_heads: 4, head_dim: 64}",
    "kvcache.gpu_memory_gb=0.03",
    "speculation.tokens=0",
    "workload.source=fixed480:32:0",
    "sampling.max_tokens=24",
    "sampling.ignore_eos=true",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--planned", default="", help="overrides of the planned run only")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    ranks, runs = arguments.ranks, []
    settings = {"pipeline only": [f"pipeline.rounds={ranks}", "kvcache.swap_pages=0"], "planned": []}
    settings["planned"] += arguments.planned.split()
    with tempfile.TemporaryDirectory() as name:
        for title, own in settings.items():
            folder = Path(name) / title.replace(" ", "-")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += ["-m", "deserve.run", *JOB, *arguments.overrides, *own, "trace=true", f"output.dir={folder}"]
            subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
            metrics = json.loads((folder / "metrics.json").read_text())
            rounds, rate = metrics["plan"]["rounds"], metrics["output_tokens_per_s"]
            runs.append((read_trace(folder / "trace.json"), f"{title}: {rounds} rounds, {rate:,.0f} output tokens/s"))
        draw_timelines(arguments.picture, runs)


if __name__ == "__main__":
    main()
