"""What a workload is made of, and what it must know of the model that will answer it."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from deserve.batch import Request
from deserve.model.tokenizer import ChatTemplate


class Tokenizer(Protocol):
    """The part of the model's tokenizer that a workload needs."""

    @property
    def longest_token(self) -> int:
        """Bytes of text that one token can stand for, at most."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that text alone never gives, by what they are called."""

    def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """Token ids of a text, of its end where there are more than `at_most`."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""

    def chat_template(self, tools: bool = False) -> ChatTemplate:
        """What the chat template (for requests with `tools`) understands; RequestError where there is none."""

    def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text of a conversation through the chat template; RequestError where that refuses it."""


@dataclass(frozen=True)
class Limits:
    """What the model can take: token ids below `vocab_size`, `max_context` tokens of prompt and output."""

    vocab_size: int
    max_context: int


@dataclass(frozen=True)
class ModelNames:
    """What a request may call the model that runs.

    `folder` is set for a model folder, whose hub id is not known: then any organisation may stand before its name.
    """

    names: tuple[str, ...]
    folder: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.names or (self.folder is not None and name.rpartition("/")[2] == self.folder)

    def __str__(self) -> str:
        return " alias ".join(self.names)


@dataclass(frozen=True)
class Rejected:
    """A line that is no request; it becomes an `error` line of the results. `line` is 1-based."""

    custom_id: str
    line: int
    code: str
    message: str


@dataclass(frozen=True)
class Answered:
    """A request that an earlier start has answered, known by its `custom_id` alone."""

    custom_id: str


Item: TypeAlias = Request | Rejected | Answered


@dataclass(frozen=True)
class Lengths:
    """How long a workload's requests are, in tokens; `count` is None where only reading it all would tell.

    `mean_output` is the mean of what the requests allow (`max_tokens`), `max_total` the largest prompt plus
    `max_tokens`. All but a synthetic workload's are taken from a sample, so a later request may be longer.
    `sizes` holds prompt and `max_tokens` of every sequence, where the sample is the whole. `exact`: no answer can end
    before its `max_tokens`.

    A request asks for `answers` sequences (`n` to each of its prompts); all means are over sequences. `shared`: the
    first tokens of a prompt, in whole pages, that `readers` sequences begin with.
    """

    count: int | None
    mean_prompt: float
    mean_output: float
    max_total: int
    sizes: tuple[tuple[int, int], ...] = ()
    exact: bool = True
    answers: float = 1.0
    shared: float = 0.0
    readers: float = math.inf

    @property
    def sequences(self) -> int | None:
        """Answers that the requests ask for."""
        return None if self.count is None else round(self.count * self.answers)

    @property
    def mean_computed(self) -> float:
        """Tokens of a prompt that are computed if those it shares are computed once for all readers."""
        return self.mean_prompt - self.shared * (1 - 1 / self.readers)

    def read_again(self, rows: float) -> float:
        """Shared tokens that `rows` sequences side by side read, beyond one copy of each."""
        return self.shared * max(0.0, rows - max(1.0, rows / self.readers))
