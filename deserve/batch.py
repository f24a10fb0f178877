"""The words everybody speaks: a request, how it is sampled, and the plan and the result of a visit."""

import base64
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
Key = tuple[str, int]  # custom_id and choice of a request
Ints = NDArray[np.signedinteger[Any]]  # counts and indices, which do not travel


def _empty(*shape: int) -> IntArray:
    return np.zeros(shape, np.int32)


NO_TOKEN = -1  # sampled where the logits are NaN or infinite: the request cannot go on
DEAD_END = -2  # sampled where the request's own rules allow no token
UNDECIDED = -3  # sampled where the likeliest tokens did not decide: whoever asks again is given the token
PENDING = -4  # in place of a token that the last visit samples, where the next one is planned before that has ended


@dataclass(frozen=True)
class Rules:
    """What one request changes in its logits; the defaults change nothing.

    `frequency_penalty` and `presence_penalty` count output tokens, `repetition_penalty` prompt and output tokens.
    `bias` adds to the logits of token ids. Only `allowed` token ids may be chosen, where there are any. No token may
    complete one of the sequences of ids `banned`. None of `ends` may be among the first `min_tokens` output tokens.
    """

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    banned: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    ends: tuple[int, ...] = ()

    @property
    def penalises(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1

    @property
    def looks_back(self) -> bool:
        """Whether earlier tokens matter."""
        return self.penalises or any(len(word) > 1 for word in self.banned)


NO_RULES = Rules()


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 cut nothing off. The same `seed` gives the same tokens
    whatever the request was batched with. `grammar`, in llguidance's notation, is what the answer keeps to. `n` answers
    are wanted, and the log-probabilities of their tokens and of the `logprobs` likeliest ones beside each, unless that
    is None; `prompt_logprobs` is the same for the tokens of the prompt.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    rules: Rules = NO_RULES
    grammar: str | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the first words of an admission say all there is to say."""
        said = self.grammar, self.logprobs, self.prompt_logprobs
        return self.rules == NO_RULES and said == (None, None, None) and not self.min_p


@dataclass(frozen=True)
class AnswerForm:
    """What becomes of the text of one request's answer.

    `dialect` is that of the tool calls to look for (a key of `deserve.model.tools.MARKS`), of which only the first
    counts without `parallel_calls`. With `split_thoughts`, thoughts become `reasoning_content`; `thinking` says that
    the prompt already opened them. `show_special`: special tokens have text. `include_stop`: so has what ended the
    answer. `before` is put before the text, and with `echo_logprobs` the prompt's log-probabilities before those of the
    answer. `prompt_logprobs` is how many the request wants apart from that. `prompt_only`: the answer is dropped.
    """

    dialect: str | None = None
    parallel_calls: bool = True
    split_thoughts: bool = False
    thinking: bool = False
    show_special: bool = False
    include_stop: bool = False
    return_token_ids: bool = False
    before: str = ""
    echo_logprobs: bool = False
    prompt_logprobs: int | None = None
    prompt_only: bool = False


PLAIN = AnswerForm()


@dataclass(frozen=True)
class Begun:
    """What has been sampled of an answer, by earlier starts of the job or, of one in flight, so far.

    `beside` [tokens, width] as `Completion` has it. `cached_tokens`: of the prompt, when it was first computed.
    """

    tokens: IntArray = field(default_factory=lambda: _empty(0))
    beside: IntArray | None = None
    cached_tokens: int = 0


NOT_BEGUN = Begun()


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to be answered.

    `prompt` holds token ids. `endpoint` is `/v1/chat/completions` or `/v1/completions`: it decides the shape of
    the result. `line` is the 1-based line of the input file, 0 for a synthetic request. `default_length`: the request
    states no `max_tokens`, and the job's default is what bounds its answer. `form` says what becomes of its text.
    `others` are those for the further prompts of the line. `choice` counts the `answers` that the line gets,
    `sampling.n` to each of its prompts; each is a request of its own. `begun` is the answer so far, with which the
    sequence starts.
    """

    custom_id: str
    prompt: IntArray
    sampling: SamplingParams = field(default_factory=SamplingParams)
    endpoint: str = "/v1/completions"
    line: int = 0
    default_length: bool = False
    form: AnswerForm = PLAIN
    others: tuple["Request", ...] = ()
    choice: int = 0
    answers: int = 1
    begun: Begun = NOT_BEGUN

    @property
    def key(self) -> Key:
        """What names it, also in files and between rings."""
        return self.custom_id, self.choice

    @property
    def prompt_number(self) -> int:
        """Which of the line's prompts this is, from 0 on."""
        return self.choice // self.sampling.n

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + len(self.begun.tokens)


def encode_words(words: IntArray | None) -> Any:
    """`words` of any shape, or None, as JSON can hold them."""
    if words is None:
        return None
    return [list(words.shape), base64.b64encode(np.ascontiguousarray(words, "<i4").tobytes()).decode()]


def decode_words(raw: Any) -> Any:
    """What was given to `encode_words`. Raises ValueError or TypeError for anything else."""
    if raw is None:
        return None
    shape, text = raw
    return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int32).reshape(shape)


def shared_tokens(one: IntArray, other: IntArray) -> int:
    """The tokens that two prompts begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


@dataclass(frozen=True)
class Completion:
    """The outcome of a request: its output tokens and the OpenAI `finish_reason`, `stop` or `length`.

    `error` is the reason where the logits after `tokens` are NaN or infinite, `dead_end` where the request's own rules
    allow no further token. `beside` [tokens, width], `prompt_beside` [prompt - 1, width]: log-probabilities, as
    `VisitResult` has them; the prompt's first token has none.
    """

    request: Request
    tokens: IntArray
    finish_reason: str
    text: str | None = None  # set where a stop string cut the text; decoded from `tokens` otherwise
    beside: IntArray | None = None
    cached_tokens: int = 0  # of the prompt, that others had computed
    prompt_beside: IntArray | None = None


@dataclass
class VisitPlan:
    """What every rank does in one visit of one micro-batch.

    A row is one sequence of the visit. All arrays are int32; page ids and slots mean the same on every rank.
    Decode rows come first, prefill rows after them. The first `ADMISSION_WORDS` words of an admission are the slot,
    how its sequence is sampled and how long its prompt is; what follows them is as long as it needs to be.
    """

    micro_batch: int
    retires: bool = False  # the last visit of this micro-batch: nothing runs, nobody waits for it again
    slots: IntArray = field(default_factory=lambda: _empty(0))  # [rows] where the sequence's state lies
    new_tokens: IntArray = field(default_factory=lambda: _empty(0))  # [rows] tokens that this visit computes
    context: IntArray = field(default_factory=lambda: _empty(0))  # [rows] tokens already in the KV cache
    samples: IntArray = field(default_factory=lambda: _empty(0))  # [rows] so many last tokens are followed by a sample
    drafts: IntArray = field(default_factory=lambda: _empty(0))  # draft tokens: all but the first of a row's samples
    scores: IntArray = field(default_factory=lambda: _empty(0))  # [rows] so many before those, by a token to score
    sorts: IntArray = field(default_factory=lambda: _empty(0))  # slots that are not UNDECIDED again
    page_writes: IntArray = field(default_factory=lambda: _empty(0, 3))  # [n, 3] slot, index in its table, page
    sliding_writes: IntArray = field(default_factory=lambda: _empty(0, 3))  # the same of sliding pages
    stash: IntArray = field(default_factory=lambda: _empty(0, 2))  # [n, 2] page, host page: copied out first
    copies: IntArray = field(default_factory=lambda: _empty(0, 2))  # [n, 2] main page, its copy: made after that
    restore: IntArray = field(default_factory=lambda: _empty(0, 2))  # [n, 2] host page, page: copied in after that
    admissions: list[IntArray] = field(default_factory=list)  # one for each sequence that is new

    @property
    def rows(self) -> int:
        return len(self.slots)

    @property
    def tokens(self) -> int:
        """Tokens this visit computes, over all rows."""
        return int(self.new_tokens.sum())

    @property
    def sampled(self) -> int:
        """Tokens this visit samples, over all rows."""
        return int(self.samples.sum())

    @property
    def rows_sampled(self) -> int:
        """Rows of which this visit samples any."""
        return int(np.count_nonzero(self.samples))

    def sampled_positions(self) -> tuple[Ints, Ints, Ints]:
        """Of each sample, [sampled] each: the row, the token among all of the visit's, and where the sample will stand
        in its sequence."""
        return self._positions(self.samples, 0 * self.samples)

    @property
    def scored(self) -> int:
        """Prompt tokens whose log-probabilities this visit tells, over all rows."""
        return int(self.scores.sum())

    def scored_positions(self) -> tuple[Ints, Ints, Ints]:
        """The same of each prompt token to score, [scored] each: the token is the one before it."""
        return self._positions(self.scores, self.samples)

    def _positions(self, counts: IntArray, behind: IntArray) -> tuple[Ints, Ints, Ints]:
        """Of the last `counts` [rows] tokens before the last `behind` [rows]."""
        row = np.repeat(np.arange(self.rows), counts)
        back = (np.cumsum(counts) + behind)[row] - np.arange(len(row))  # 1 for the last token of a row
        token = np.cumsum(self.new_tokens)[row] - back
        return row, token, (self.context + self.new_tokens)[row] - back + 1

    def assumed(self) -> IntArray:
        """Of each sample [sampled], the draft token that stands in its place; NO_TOKEN behind a row's last token."""
        tokens = np.full(self.sampled, NO_TOKEN, np.int32)
        drafted = np.ones(len(tokens), bool)
        drafted[np.cumsum(self.samples)[self.samples > 0] - 1] = False
        tokens[drafted] = self.drafts
        return tokens

    def encode(self) -> IntArray:
        """The plan as one int32 array [words], as it travels."""
        lengths = np.array([len(admission) for admission in self.admissions], np.int32)
        sections = [getattr(self, name) for name in _SECTIONS]
        header = np.array([self.micro_batch, self.retires, *map(len, sections), len(lengths)], np.int32)
        return np.concatenate([header, *(section.reshape(-1) for section in sections), lengths, *self.admissions])

    @staticmethod
    def decode(words: IntArray) -> "VisitPlan":
        """The plan that `encode` turned into `words`."""
        plan = VisitPlan(micro_batch=int(words[0]), retires=bool(words[1]))
        *counts, admissions = words[2:_HEADER_WORDS].tolist()
        at = _HEADER_WORDS
        for count, (name, width) in zip(counts, _SECTIONS.items(), strict=True):
            section = words[at : at + count * width]
            setattr(plan, name, section if width == 1 else section.reshape(count, width))
            at += count * width
        ends = at + admissions + np.cumsum(words[at : at + admissions])
        plan.admissions = np.split(words[at + admissions :], ends[:-1] - at - admissions) if admissions else []
        return plan

    @staticmethod
    def max_words(rows: int, pages: int, tokens: int, slides: bool = False) -> int:
        """Words of the longest plan of at most `rows` sequences and `tokens` tokens, where a micro-batch can own
        `pages` pages.

        New sequences read as many prefix pages besides, each counted for each of them. `slides`: of sliding pages, too.
        """
        sliding = 3 * (rows + pages + tokens) if slides else 0
        rest = rows * (6 + 2 + 1 + ADMISSION_WORDS) + pages * (2 * 3 + 2 + 2) + tokens + ADMISSION_ROOM
        return _HEADER_WORDS + rest + sliding


MOST_LOGPROBS = 20  # likeliest tokens that a request may ask for beside each of its own, as in OpenAI's API


def beside_width(logprobs: int | None) -> int:
    """Words beside a token of a request that asks for so many `logprobs`."""
    return 0 if logprobs is None else 1 + 2 * logprobs


def narrowed(beside: IntArray, logprobs: int) -> IntArray:
    """A copy of `beside` [tokens, 1 + 2 * top] with the first `logprobs` of the likeliest tokens alone."""
    top = beside.shape[1] // 2
    return beside[:, [0, *range(1, 1 + logprobs), *range(1 + top, 1 + top + logprobs)]]


SCORE_WIDTH = beside_width(MOST_LOGPROBS) + 1
ADMISSION_WORDS = 7  # that every admission has
ADMISSION_ROOM = 1 << 18  # words that the admissions of a visit may have beyond those: rules, a grammar, a prompt
_SECTIONS = {
    "slots": 1,
    "new_tokens": 1,
    "context": 1,
    "samples": 1,
    "drafts": 1,
    "scores": 1,
    "sorts": 1,
    "page_writes": 3,
    "sliding_writes": 3,
    "stash": 2,
    "copies": 2,
    "restore": 2,
}
_HEADER_WORDS = 2 + len(_SECTIONS) + 1


@dataclass(frozen=True)
class VisitResult:
    """What a visit brings back to rank 0: the sampled tokens, in the order of the plan's rows.

    `beside` [sampled, width] holds further int32 words of each token: the bits of its log-probability (float32), then
    the ids of the likeliest tokens, then the bits of theirs. The width is what the most
    demanding row asked for. Where it is 0, the words of the result are its tokens.

    `prompt_beside` [scored, SCORE_WIDTH] holds the same of the prompt tokens that were scored, with MOST_LOGPROBS
    likeliest tokens beside each, and the rank of its own, 1 for the likeliest.
    """

    tokens: IntArray  # [sampled]
    beside: IntArray = field(default_factory=lambda: _empty(0, 0))
    prompt_beside: IntArray = field(default_factory=lambda: _empty(0, SCORE_WIDTH))

    def encode(self) -> IntArray:
        """The result as one int32 array [words], as it travels: all tokens, then all that stands beside them."""
        return np.concatenate([self.tokens, self.beside.reshape(-1), self.prompt_beside.reshape(-1)])

    @staticmethod
    def decode(words: IntArray, sampled: int, scored: int = 0) -> "VisitResult":
        """The result that `encode` turned into `words`, of a visit that sampled and scored so many tokens."""
        end = len(words) - scored * SCORE_WIDTH
        beside = words[sampled:end].reshape(sampled, -1) if sampled else _empty(0, 0)
        return VisitResult(words[:sampled], beside, words[end:].reshape(scored, SCORE_WIDTH))

    @staticmethod
    def max_words(sampled: int, width: int = 0) -> int:
        """Words of the longest result of at most `sampled` tokens with `width` words beside each."""
        return sampled * (1 + width)
