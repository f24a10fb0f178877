"""The words everybody speaks: a request, how it is sampled, and the plan of one visit."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]

NO_TOKEN = -1  # sampled where the logits are NaN or infinite: the request cannot go on


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
    the result. `line` is the 1-based line of the input file, 0 for a synthetic request. `default_length`: the request
    states no `max_tokens`, and the job's default is what bounds its answer.
    """

    custom_id: str
    prompt: IntArray
    sampling: SamplingParams = field(default_factory=SamplingParams)
    endpoint: str = "/v1/completions"
    line: int = 0
    default_length: bool = False


@dataclass(frozen=True)
class Completion:
    """The outcome of a request: its output tokens and the OpenAI `finish_reason`, `stop` or `length`.

    `error` is the reason where the logits after `tokens` are NaN or infinite.
    """

    request: Request
    tokens: IntArray
    finish_reason: str
    text: str | None = None  # set where a stop string cut the text; decoded from `tokens` otherwise


def _empty(*shape: int) -> IntArray:
    return np.zeros(shape, np.int32)


@dataclass
class StepPlan:
    """What every rank does in one visit of one micro-batch.

    A row is one sequence of the visit. All arrays are int32; page ids and slots mean the same on every rank.
    Decode rows come first, prefill rows after them.
    """

    micro_batch: int
    retires: bool = False  # the last visit of this micro-batch: nothing runs, nobody waits for it again
    slots: IntArray = field(default_factory=lambda: _empty(0))  # [rows] where the sequence's state lies
    new_tokens: IntArray = field(default_factory=lambda: _empty(0))  # [rows] tokens that this visit computes
    context: IntArray = field(default_factory=lambda: _empty(0))  # [rows] tokens already in the KV cache
    sampled: IntArray = field(default_factory=lambda: _empty(0))  # [n] rows whose last token is followed by a sample
    page_writes: IntArray = field(default_factory=lambda: _empty(0, 3))  # [n, 3] slot, index in its table, page
    admitted: IntArray = field(default_factory=lambda: _empty(0, 6))  # [n, 6] slot and how it is sampled
    stash: IntArray = field(default_factory=lambda: _empty(0, 2))  # [n, 2] page, host page: copied out first
    restore: IntArray = field(default_factory=lambda: _empty(0, 2))  # [n, 2] host page, page: copied in after that

    @property
    def rows(self) -> int:
        return len(self.slots)

    @property
    def tokens(self) -> int:
        """Tokens this visit computes, over all rows."""
        return int(self.new_tokens.sum())

    def encode(self) -> IntArray:
        """The plan as one int32 array [words], as it travels."""
        parts = [getattr(self, name).reshape(-1) for name in _SECTIONS]
        counts = [len(getattr(self, name)) for name in _SECTIONS]
        header = np.array([self.micro_batch, self.retires, *counts], np.int32)
        return np.concatenate([header, *parts])

    @staticmethod
    def decode(words: IntArray) -> "StepPlan":
        """The plan that `encode` turned into `words`."""
        plan = StepPlan(micro_batch=int(words[0]), retires=bool(words[1]))
        at = _HEADER_WORDS
        for count, (name, width) in zip(words[2:_HEADER_WORDS].tolist(), _SECTIONS.items(), strict=True):
            section = words[at : at + count * width]
            setattr(plan, name, section if width == 1 else section.reshape(count, width))
            at += count * width
        return plan

    @staticmethod
    def max_words(rows: int, pages: int) -> int:
        """Words of the longest plan of at most `rows` sequences, where a micro-batch can own `pages` pages."""
        return _HEADER_WORDS + rows * (4 + 6) + pages * (3 + 2 + 2)


_SECTIONS = {
    "slots": 1,
    "new_tokens": 1,
    "context": 1,
    "sampled": 1,
    "page_writes": 3,
    "admitted": 6,
    "stash": 2,
    "restore": 2,
}
_HEADER_WORDS = 2 + len(_SECTIONS)
