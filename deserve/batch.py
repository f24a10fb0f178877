"""The words everybody speaks: a request, how it is sampled, and the plan of one visit."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 cut nothing off. The same `seed` gives the same tokens
    whatever the request was batched with.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    `prompt` holds token ids. `endpoint` is `/v1/chat/completions` or `/v1/completions`: it decides the shape of
    the result. `line` is the 1-based line of the input file, 0 for a synthetic request.
    """

    custom_id: str
    prompt: IntArray
    sampling: SamplingParams = field(default_factory=SamplingParams)
    endpoint: str = "/v1/completions"
    line: int = 0


@dataclass(frozen=True)
class Completion:
    """What became of a request: its output tokens and the OpenAI `finish_reason` (`stop` or `length`)."""

    request: Request
    tokens: IntArray
    finish_reason: str
    text: str | None = None  # set where a stop string cut the text; decoded from `tokens` otherwise


Metadata = dict[str, Any]
