"""Drives any server of the OpenAI API with a workload of DeServe's; writes the same `metrics.json` as a run.

    python -m bench.peers.client --url http://127.0.0.1:8000 --concurrency 128 --output outputs/peer \
        model=smollm2-135m workload.source=fixed128:64:0 sampling.max_tokens=64 sampling.ignore_eos=true

The overrides are those of `deserve.run`: model (for its vocabulary and tokenizer), workload and sampling. Prompts go as
token ids to `POST /v1/completions`, answers come as a stream. A chunk of the stream counts as one token until the
`usage` of the last one tells how many there were. `--export FILE` writes the prompts instead, for `vllm_offline`.
Needs `pip install -e '.[bench]'` (aiohttp).
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deserve.batch import Completion, Request
from deserve.config import Config, as_dict, load_config
from deserve.errors import UserError
from deserve.model.checkpoint import resolve
from deserve.model.tokenizer import load_tokenizer
from deserve.report.metrics import write_metrics
from deserve.report.progress import Progress
from deserve.workload import Limits, default_sampling, open_workload


def requests_of(config: Config) -> list[Request]:
    """The requests that a run with `config` would answer."""
    checkpoint = resolve(config.model)
    limits = Limits(checkpoint.config.vocab_size, checkpoint.config.max_context)
    defaults = default_sampling(config.sampling, checkpoint.generation)
    items = open_workload(config, load_tokenizer(checkpoint), limits, defaults)
    return [item for item in items if isinstance(item, Request)]


def body(request: Request, model: str) -> dict[str, Any]:
    """`request` as the JSON of `POST /v1/completions`."""
    sampling = request.sampling
    fields: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt.tolist(),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed % 2**31,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    # Beyond the OpenAI API, but vLLM, SGLang and others know them; left out where they say nothing.
    if sampling.top_k:
        fields["top_k"] = sampling.top_k
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    return fields


async def drive(url: str, model: str, requests: list[Request], concurrency: int, progress: Progress) -> None:
    """Have the server at `url` answer `requests`, `concurrency` of them at a time."""
    import aiohttp

    waiting: Iterator[Request] = iter(requests)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def work() -> None:
            for request in waiting:  # shared: each takes the next one
                try:
                    tokens, reason = await answer(session, request)
                except (aiohttp.ClientError, UserError, ValueError) as error:
                    print(f"{request.custom_id}: {error}", file=sys.stderr)
                    progress.request(error=(request.custom_id, "failed", str(error)))
                else:
                    progress.request(Completion(request, np.zeros(tokens, np.int32), reason))

        async def answer(session: aiohttp.ClientSession, request: Request) -> tuple[int, str]:
            seen, told, reason = 0, None, "length"
            async with session.post(f"{url}/v1/completions", json=body(request, model)) as response:
                if response.status != 200:
                    raise UserError(f"{response.status}: {(await response.text())[:300]}")
                async for line in response.content:
                    data = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    chunk = json.loads(data)
                    if chunk.get("usage"):
                        told = int(chunk["usage"]["completion_tokens"])
                    for choice in chunk.get("choices", ()):
                        reason = choice.get("finish_reason") or reason
                        if choice.get("text"):
                            seen += 1
                            progress.tokens(1, 1)
            if told is None:
                told = seen
            progress.tokens(told - seen, told - seen)
            return told, reason

        progress.start()
        await asyncio.gather(*(work() for _ in range(concurrency)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--served-model", help="the server's name for the model; otherwise the first that it lists")
    parser.add_argument("--concurrency", type=int, default=128, help="requests at a time")
    parser.add_argument("--output", type=Path, default=Path("outputs/peer"), help="folder for metrics.json")
    parser.add_argument("--export", type=Path, help="write the prompts to this file and send nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.overrides)
    requests = requests_of(config)
    if arguments.export:
        lines = ({"prompt": r.prompt.tolist(), "max_tokens": r.sampling.max_tokens} for r in requests)
        arguments.export.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0
    model = arguments.served_model or asyncio.run(first_model(arguments.url))
    progress = Progress(len(requests), config.warmup_s)
    asyncio.run(drive(arguments.url, model, requests, arguments.concurrency, progress))
    progress.close()
    arguments.output.mkdir(parents=True, exist_ok=True)
    told = {"system": arguments.url, "concurrency": arguments.concurrency, **as_dict(config)}
    summary = progress.summary()
    write_metrics(arguments.output / "metrics.json", {**summary, "stages": [], "plan": {}, "config": told})
    print(f"{summary['output_tokens_per_s']:,.1f} output tokens/s, {summary['errors']} errors")
    return 1 if summary["errors"] else 0


async def first_model(url: str) -> str:
    """The first model that the server at `url` lists."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
        return str((await response.json())["data"][0]["id"])


if __name__ == "__main__":
    sys.exit(main())
