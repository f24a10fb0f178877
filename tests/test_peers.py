"""The client of OpenAI-compatible servers, against a server that answers as such servers do."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="pip install -e '.[bench]'")

from aiohttp import web

from bench.peers.client import body, drive, first_model, requests_of
from deserve.batch import Request, SamplingParams
from deserve.config import load_config
from deserve.report.progress import Progress


class Server:
    """Answers with `max_tokens` tokens, two of them in a chunk now and then; refuses prompts of 13 tokens."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.bodies.append(asked)
        if len(asked["prompt"]) == 13:
            return web.json_response({"error": {"message": "unlucky"}}, status=400)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        left = asked["max_tokens"]
        while left:
            count = min(left, 2)
            left -= count
            choice = {"index": 0, "text": "x" * count, "finish_reason": None if left else "length"}
            await answer.write(b"data: " + json.dumps({"choices": [choice], "usage": None}).encode() + b"\n\n")
            await asyncio.sleep(0.001)
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        await answer.write(b": a comment\n\ndata: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        self.at_once -= 1
        return answer

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "some/model"}]})


def test_client_counts_what_the_server_says() -> None:
    overrides = ["model=tiny", "workload.source=fixed12:20:4", "sampling.max_tokens=7", "sampling.ignore_eos=true"]
    requests = requests_of(load_config(overrides))
    requests.append(Request("refused", np.zeros(13, np.int32), SamplingParams(max_tokens=5)))
    refused = sum(len(request.prompt) == 13 for request in requests)
    server, progress = Server(), Progress(len(requests), 0)

    async def play() -> str:
        application = web.Application()
        application.router.add_post("/v1/completions", server.completions)
        application.router.add_get("/v1/models", server.models)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        model = await first_model(url)
        await drive(url, model, requests, 3, progress)
        await runner.cleanup()
        return model

    assert asyncio.run(play()) == "some/model"
    summary = progress.summary()
    assert (summary["requests"], summary["errors"]) == (len(requests), refused)
    answered = len(requests) - refused
    assert summary["output_tokens"] == 7 * answered == sum(summary["history"]["output_tokens"])
    assert summary["input_tokens"] == sum(len(r.prompt) for r in requests if len(r.prompt) != 13)
    assert server.most_at_once <= 3
    assert sorted(map(len, (b["prompt"] for b in server.bodies))) == sorted(len(r.prompt) for r in requests)


def test_body_says_what_the_request_says() -> None:
    sampling = SamplingParams(max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop=("a",), ignore_eos=True)
    said = body(Request("r", np.array([1, 2], np.int32), sampling), "m")
    expected = {"model": "m", "prompt": [1, 2], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7}
    expected |= {"seed": 3, "stop": ["a"], "ignore_eos": True, "stream": True}
    assert said == {**expected, "stream_options": {"include_usage": True}}
    plain = body(Request("r", np.array([1], np.int32), SamplingParams()), "m")
    assert not {"stop", "top_k", "ignore_eos"} & plain.keys()
