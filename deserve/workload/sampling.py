"""Sampling parameters: the job's defaults, and what one request says itself."""

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from deserve.batch import SamplingParams
from deserve.config import SamplingSection
from deserve.errors import RequestError, UserError
from deserve.workload.checks import brief, checked_flag, checked_number, checked_text, checked_whole

# Below this the most probable token is certain in float32, and dividing the logits by it would overflow.
GREEDY_BELOW = 1e-5

SEEDS = 2**63  # a seed is in [0, SEEDS): it fits an int64 tensor

# Parameters that would change the answer and are not implemented, with the values at which they change
# nothing (null never does). Ignoring any other value would give a wrong answer, so the request is refused.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "echo": (False,),
    "suffix": ("",),
}


def default_sampling(section: SamplingSection, generation: dict[str, Any]) -> SamplingParams:
    """The parameters of a request that states none: `sampling.*`, and `generation` (generation_config.json).

    Where the user set none of temperature, top_p and top_k, the model's own three hold if it says
    `do_sample`, and greedy decoding otherwise. Where the user set one of them, the model's are ignored. In
    both cases a temperature left out is 1, as the others ask for sampling; a top_p or top_k left out cuts
    nothing.

    `seed` is the job's; `with_derived_seed` makes each request's from it. Raises UserError, naming the key,
    for an impossible value.
    """
    prefix = "sampling."
    values = {"temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
    if all(value is None for value in values.values()):
        prefix = "generation_config.json: "
        values = {key: generation.get(key) if generation.get("do_sample") else None for key in values}
        if not generation.get("do_sample"):
            values["temperature"] = 0.0
    base = SamplingParams(
        max_tokens=section.max_tokens,
        temperature=1.0,
        seed=section.seed,
        ignore_eos=section.ignore_eos,
    )
    try:
        return request_sampling(values | {"stop": section.stop}, base)
    except RequestError as error:
        raise UserError(f"{prefix}{error}") from error


def request_sampling(body: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    """`defaults` with what the JSON object `body` says itself; null is the same as not saying it.

    `max_completion_tokens` wins over `max_tokens`. A seed is any int64, a negative one wraps. Raises
    RequestError for an ill-typed or impossible value, and for an `UNSUPPORTED` parameter.
    """
    for key, harmless in UNSUPPORTED.items():
        value = body.get(key)
        # The types are compared too: `logprobs: 0` asks for something, `logprobs: false` does not.
        if value is not None and not any(type(value) is type(other) and value == other for other in harmless):
            raise RequestError("unsupported_parameter", f"{key}={brief(value)} is not supported")

    def said(key: str, check: Callable[..., Any], default: Any, *bounds: Any) -> Any:
        return default if body.get(key) is None else check(body[key], key, *bounds)

    temperature = said(
        "temperature",
        checked_number,
        defaults.temperature,
        0,
        sys.float_info.max,
        "a finite number of at least 0",
    )
    max_tokens = said("max_tokens", checked_whole, defaults.max_tokens, 1)
    return SamplingParams(
        max_tokens=said("max_completion_tokens", checked_whole, max_tokens, 1),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=said("top_p", checked_number, defaults.top_p, math.ulp(0), 1, "a number over 0 and at most 1"),
        top_k=said("top_k", checked_whole, defaults.top_k, 0),
        seed=said("seed", checked_whole, defaults.seed, -SEEDS, SEEDS - 1) % SEEDS,
        stop=said("stop", _checked_stop, defaults.stop),
        ignore_eos=said("ignore_eos", checked_flag, defaults.ignore_eos),
    )


def with_derived_seed(defaults: SamplingParams, custom_id: str) -> SamplingParams:
    """`defaults` with a seed of `custom_id`'s own, the same in every run.

    If every request sampled with the job's seed itself, equal prompts would get equal answers: of a question
    asked a hundred times, the hundred samples would be one.
    """
    digest = hashlib.blake2b(f"{defaults.seed}:{custom_id}".encode(), digest_size=8).digest()
    return replace(defaults, seed=int.from_bytes(digest, "little") % SEEDS)


def _checked_stop(value: Any, name: str) -> tuple[str, ...]:
    texts = tuple(checked_text(text, name) for text in (value if isinstance(value, list) else [value]))
    if "" in texts:
        raise RequestError("invalid_value", f"{name} holds an empty string, which would end every answer at once")
    return texts
