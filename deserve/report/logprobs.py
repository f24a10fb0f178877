"""Log-probabilities as OpenAI's API has them, from what stands beside the tokens of a result."""

from collections.abc import Callable
from typing import Any

import numpy as np

from deserve.batch import IntArray, narrowed

LEAST = -9999.0  # JSON has no infinity: the figure that vLLM gives for a token that cannot be chosen


def chat_logprobs(tokens: IntArray, beside: IntArray, text: Callable[[int], str]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion. `text` gives that of a token alone.

    beside: [tokens, 1 + 2 * top], as `VisitResult` has it.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        shown = text(token)
        return {"token": shown, "logprob": logprob, "bytes": list(shown.encode())}

    own, ids, best = _parts(beside)
    content = [
        entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in zip(others, of, strict=True)]}
        for token, logprob, others, of in zip(tokens.tolist(), own, ids, best, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: IntArray, beside: IntArray, text: Callable[[int], str], echoed: tuple[IntArray, IntArray] | None = None
) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion; each token is among its own `top_logprobs`, as in OpenAI's API.

    `echoed`: tokens and `prompt_beside` of the prompt, where that comes first. Its first token has no probability.
    """
    if echoed is not None:
        prompt, scores = echoed
        scores = narrowed(scores[:, :-1], beside.shape[1] // 2)
        tokens = np.concatenate([prompt, tokens])
        beside = np.concatenate([np.zeros((1, scores.shape[1]), np.int32), scores, beside])
    own, ids, best = _parts(beside)
    texts = [text(token) for token in tokens.tolist()]
    lengths = np.array([len(shown) for shown in texts], np.int64)
    top = [
        {text(other): logprob for other, logprob in zip(others, of, strict=True)} | {shown: logprob_}
        for shown, logprob_, others, of in zip(texts, own, ids, best, strict=True)
    ]
    first = [] if echoed is None else [None]
    return {
        "tokens": texts,
        "token_logprobs": [*first, *own[len(first) :]],
        "top_logprobs": [*first, *top[len(first) :]],
        "text_offset": (np.cumsum(lengths) - lengths).tolist(),
    }


def prompt_logprobs(
    prompt: IntArray, beside: IntArray, logprobs: int, text: Callable[[int], str]
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM has them: of each token, and of the `logprobs` likeliest in its place, by token id.

    beside: [prompt - 1, 2 + 2 * top], as `VisitResult` has it for prompts.
    """
    entries: list[dict[str, Any] | None] = [None]
    own, ids, best = _parts(beside[:, :-1])
    for token, its, rank, others, of in zip(prompt[1:].tolist(), own, beside[:, -1].tolist(), ids, best, strict=True):
        likeliest = zip(others[:logprobs], of, range(1, logprobs + 1), strict=False)
        values = {other: (logprob, place) for other, logprob, place in likeliest}
        values.setdefault(token, (its, rank))
        entries.append(
            {
                str(other): {"logprob": logprob, "rank": place, "decoded_token": text(other)}
                for other, (logprob, place) in values.items()
            }
        )
    return entries


def _parts(beside: IntArray) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """The tokens' own log-probabilities, the likeliest tokens beside each, and theirs."""
    top = beside.shape[1] // 2
    values = np.maximum(np.ascontiguousarray(beside).view(np.float32), LEAST)
    return values[:, 0].tolist(), beside[:, 1 : 1 + top].tolist(), values[:, 1 + top :].tolist()
