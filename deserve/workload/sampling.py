"""Sampling parameters: the job's defaults, and what one request says itself."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deserve.batch import Request, SamplingParams
from deserve.config import SamplingSection
from deserve.errors import RequestError, UserError
from deserve.workload.schema import SEEDS, Sampling, validated

# Below this the most probable token is certain in float32, and dividing the logits by it would overflow.
GREEDY_BELOW = 1e-5

# More tokens than any context: `sampling.max_tokens=null`. What a request gets is cut to the room behind its prompt.
TO_THE_END = 2**31 - 1


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
        max_tokens=TO_THE_END if section.max_tokens is None else section.max_tokens,
        temperature=1.0,
        seed=section.seed,
        ignore_eos=section.ignore_eos,
    )
    try:
        return request_sampling(validated(Sampling, values | {"stop": section.stop}), base)
    except RequestError as error:
        raise UserError(f"{prefix}{error}") from error


def request_sampling(said: Sampling, defaults: SamplingParams) -> SamplingParams:
    """`defaults` with what a request says itself.

    `max_completion_tokens` wins over `max_tokens`. A seed of -1 is none, as in vLLM; other negative ones wrap.
    """

    def either(value: Any, default: Any) -> Any:
        return default if value is None else value

    temperature = either(said.temperature, defaults.temperature)
    return SamplingParams(
        max_tokens=either(said.max_completion_tokens, either(said.max_tokens, defaults.max_tokens)),
        temperature=0.0 if temperature < GREEDY_BELOW else float(temperature),
        top_p=float(either(said.top_p, defaults.top_p)),
        top_k=max(0, either(said.top_k, defaults.top_k)),
        seed=either(None if said.seed == -1 else said.seed, defaults.seed) % SEEDS,
        stop=either(said.stop, defaults.stop),
        ignore_eos=either(said.ignore_eos, defaults.ignore_eos),
        stop_token_ids=tuple(said.stop_token_ids or ()),
    )


def with_derived_seed(defaults: SamplingParams, custom_id: str) -> SamplingParams:
    """`defaults` with a seed of `custom_id`'s own, the same in every run.

    If every request sampled with the job's seed itself, equal prompts would get equal answers: of a question
    asked a hundred times, the hundred samples would be one.
    """
    digest = hashlib.blake2b(f"{defaults.seed}:{custom_id}".encode(), digest_size=8).digest()
    return replace(defaults, seed=int.from_bytes(digest, "little") % SEEDS)


def choices(request: Request) -> Iterator[Request]:
    """The answers that the line of `request` asks for, `n` to each of its prompts, as requests of their own.

    All but the first derive their seeds. The first answer to a prompt brings the prompt's log-probabilities.
    """
    prompts, n = (request, *request.others), request.sampling.n
    answers = n * len(prompts)
    for choice in range(answers):
        one = prompts[choice // n]
        sampling = with_derived_seed(one.sampling, str(choice)) if choice else one.sampling
        if choice % n:
            sampling = replace(sampling, prompt_logprobs=None)
        yield replace(one, sampling=sampling, others=(), choice=choice, answers=answers)
