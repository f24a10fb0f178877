"""vLLM's CPU build and DeServe on the same prompts, on the cores of this machine; prints one Markdown table a workload.

    python -m bench.peers.compare_vllm_cpu --environment FOLDER [--cells 640:64:64,300:400:16] [--repeats 3]

FOLDER becomes a virtual environment with vLLM, if it is none yet (`vllm_cpu_environment.sh`). SmolLM2-135M in bfloat16,
greedy, end-of-text ignored, no latency; a cell is REQUESTS:TOKENS IN:TOKENS OUT. In turns: vLLM in one process on all
cores, vLLM in two pipeline ranks with half the cores each, DeServe likewise. Loading and compiling are not timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.report import plot, read, table
from deserve.model.smollm2 import ensure_smollm2

ROOT = Path(__file__).resolve().parent.parent.parent


class Cell(NamedTuple):
    """A workload: so many `requests` of `prompt` tokens in and `answer` out."""

    requests: int
    prompt: int
    answer: int

    def overrides(self) -> list[str]:
        source = f"workload.source=fixed{self.requests}:{self.prompt}:0"
        fixed = ["sampling.ignore_eos=true", "sampling.temperature=0", f"sampling.max_tokens={self.answer}"]
        return ["model=smollm2-135m", source, *fixed]


def execute(command: list[str], log: Path, **environment: str) -> None:
    """Run `command` in the checkout with its output in `log`."""
    with log.open("w") as file:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            check=False,
        )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed; the end of {log}:\n{log.read_text()[-3000:]}")


def vllm(python: Path, ranks: int, cell: Cell, folder: Path, kv_gb: int) -> None:
    """A run of vLLM in `ranks` pipeline ranks; its metrics go to `folder`."""
    prompts = folder / "prompts.jsonl"
    export = [sys.executable, "-m", "bench.peers.client", f"--export={prompts}", *cell.overrides()]
    execute(export, folder / "export.log")
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    binding = "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))
    engine = {"max_model_len": 2048, "max_num_seqs": cell.requests, "pipeline_parallel_size": ranks}
    command = [str(python), "-m", "bench.peers.vllm_offline", str(ensure_smollm2()), str(prompts)]
    command += [str(folder / "metrics.json"), f"--engine={json.dumps(engine)}"]
    execute(
        command,
        folder / "log",
        VLLM_CPU_OMP_THREADS_BIND=binding,
        VLLM_CPU_KVCACHE_SPACE=str(kv_gb),
        HF_HUB_OFFLINE="1",
    )


def deserve(ranks: int, cell: Cell, folder: Path) -> None:
    """A run of DeServe on `ranks` ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "deserve.run", *cell.overrides(), f"output.dir={folder}"]
    command.append("speculation.tokens=0")  # prompts of random tokens are answered with loops, which are easily guessed
    execute(command, folder / "log", OMP_NUM_THREADS="1")  # shared out by the program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument(
        "--python", default=sys.executable, help="to make it with: the version that torch's build is for"
    )
    parser.add_argument("--cells", default="128:64:64,640:64:64", help="REQUESTS:TOKENS IN:TOKENS OUT, ...")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kv-gb", type=int, default=2, help="vLLM's KV memory, of each rank")
    parser.add_argument("--output", type=Path, help="keep logs, metrics and plots here")
    arguments = parser.parse_args()
    environment = arguments.environment.absolute()
    if not (environment / "ready").exists():
        script = Path(__file__).with_name("vllm_cpu_environment.sh")
        subprocess.run(["bash", str(script), str(environment), arguments.python], check=True, stdout=sys.stderr)
        (environment / "ready").touch()
    python = environment / "bin" / "python"
    output = (arguments.output or Path(tempfile.mkdtemp())).absolute()
    for cell in (Cell(*map(int, each.split(":"))) for each in arguments.cells.split(",")):
        name_of_cell = "-".join(map(str, cell))
        folders: dict[str, list[Path]] = {}
        for repeat in range(arguments.repeats):
            for name, system, ranks in (
                ("vLLM, one process", "vllm", 1),
                ("vLLM, 2 pipeline ranks", "vllm", 2),
                ("DeServe, one rank", "deserve", 1),
                ("DeServe, 2 ranks", "deserve", 2),
            ):
                folder = output / f"{system}-{ranks}-{name_of_cell}-{repeat}"
                folder.mkdir(parents=True, exist_ok=True)
                if system == "vllm":
                    vllm(python, ranks, cell, folder, arguments.kv_gb)
                else:
                    deserve(ranks, cell, folder)
                folders.setdefault(name, []).append(folder)
                print(f"{name}, {name_of_cell}: {read(str(folder))['output_tokens_per_s']:,.1f}", file=sys.stderr)
        runs = {name: [read(str(folder)) for folder in places] for name, places in folders.items()}
        print(f"{cell.requests} requests of {cell.prompt} tokens in, {cell.answer} out:\n\n{table(runs)}\n", flush=True)
        plot(output / f"{name_of_cell}.png", runs)


if __name__ == "__main__":
    main()
