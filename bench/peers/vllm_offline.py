"""Runs vLLM's `LLM.generate` on prompts of token ids and writes the same `metrics.json` as a run of DeServe.

    VLLM_ENVIRONMENT/bin/python -m bench.peers.vllm_offline MODEL_FOLDER PROMPTS.jsonl METRICS.json \
        --engine '{"pipeline_parallel_size": 2}'

Lines of PROMPTS.jsonl: `{"prompt": [token ids], "max_tokens": N}`, as `bench.peers.client --export` writes them.
Greedy, end-of-text ignored. Time counts from when the engine is ready to the last answer.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from deserve.batch import Completion, Request
from deserve.report.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--engine", default="{}", help="arguments of vllm.LLM, as JSON")
    arguments = parser.parse_args()
    import vllm

    lines = [json.loads(line) for line in arguments.prompts.read_text().splitlines()]
    engine: dict[str, Any] = {"dtype": "bfloat16", "enable_prefix_caching": False, **json.loads(arguments.engine)}
    llm = vllm.LLM(str(arguments.model), **engine)
    prompts = [{"prompt_token_ids": line["prompt"]} for line in lines]
    sampling = [vllm.SamplingParams(temperature=0, max_tokens=line["max_tokens"], ignore_eos=True) for line in lines]
    progress = Progress(len(lines), 0)
    progress.start()
    for index, answer in enumerate(llm.generate(prompts, sampling, use_tqdm=False)):
        tokens = np.array(answer.outputs[0].token_ids, np.int32)
        progress.tokens(len(tokens), len(tokens))
        request = Request(str(index), np.array(lines[index]["prompt"], np.int32))
        progress.request(Completion(request, tokens, "length"))
    progress.close()
    config = {"system": f"vLLM {vllm.__version__}", "engine": engine, "model": {"path": str(arguments.model)}}
    metrics = {**progress.summary(), "stages": [], "plan": {}, "config": config}
    arguments.metrics.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
