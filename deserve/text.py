"""From output tokens to text: what a completion reads as behind its prompt, and where a stop string ends it."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from deserve.batch import PLAIN, Completion, IntArray, Request
from deserve.model.tokenizer import ByteTokenizer, Tokenizer
from deserve.model.tools import MARKS, THOUGHTS, Answer, parse, split_reasoning
from deserve.report.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from deserve.scheduler.sequences import Cut

BROKEN = "\ufffd"  # stands for bytes that are no character, or not yet one
CONTEXT = range(8, 33)  # last tokens of a prompt to decode with
MOST_PENDING = 16  # tokens of a character that does not become whole: nothing needs so many


class Detokenizer:
    """Decodes the outputs of one job. Without a tokenizer, text is token ids.

    Special tokens have no text, unless `show_special`.
    """

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer | None, show_special: bool = False):
        self.special: dict[str, int] = tokenizer.special_tokens if tokenizer is not None else {}
        self.decode: Callable[[list[int]], str] = token_text
        self.decode_batch: Callable[[Sequence[list[int]]], list[str]] = token_texts
        if tokenizer is not None:
            self.decode = partial(tokenizer.decode, show_special=show_special)
            self.decode_batch = partial(tokenizer.decode_batch, show_special=show_special)
        self._reads_on = tokenizer is not None

    def text(self, prompt: IntArray, tokens: IntArray) -> str:
        """The text of output `tokens`, such that it continues the text of `prompt`.

        A decoder drops the space before a text's first word (SentencePiece's do), and bytes on both sides of the
        border may be one character, so the tokens are decoded behind the prompt's last ones.
        """
        context, before = self.context(prompt)
        output = tokens.tolist()
        text = added(before, self.decode([*context, *output]))
        return self.decode(output) if text is None else text

    def completion(self, completion: Completion) -> str:
        """The text of an answer. The token that ended it is no part of it, even if it is an ordinary one."""
        if completion.text is not None:
            return completion.text
        tokens = completion.tokens
        stop_token = len(tokens) > 0 and tokens[-1] in completion.request.sampling.stop_token_ids
        ended = completion.finish_reason == "stop" and (self._reads_on or stop_token)
        return self.text(completion.request.prompt, tokens[:-1] if ended else tokens)

    def context(self, prompt: IntArray) -> tuple[list[int], str]:
        """The last tokens of `prompt`, as many as it takes to know how text goes on behind them, and their text."""
        if not self._reads_on:
            return [], ""
        for count in (*CONTEXT, len(prompt)):
            tokens = prompt[-count:].tolist()
            text = self.decode(tokens)
            # Begun within a character, the bytes of a whole run may be read as broken.
            if text and not text.startswith(BROKEN):
                break
        return tokens, text


class AnswerReader:
    """Reads what completions say: their text, their tool calls and thoughts where the request wants them apart."""

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer | None):
        self._plain, self._all = Detokenizer(tokenizer), Detokenizer(tokenizer, show_special=True)

    def __call__(self, completion: Completion) -> Answer:
        answer = self._answer(completion)
        request, beside, scores = completion.request, completion.beside, completion.prompt_beside
        if request.form.prompt_logprobs is not None and scores is not None:
            of_prompt = prompt_logprobs(request.prompt, scores, request.form.prompt_logprobs, self._token)
            answer = replace(answer, prompt_logprobs=of_prompt)
        if beside is None:
            return answer
        if request.endpoint == "/v1/chat/completions":
            return replace(answer, logprobs=chat_logprobs(completion.tokens, beside, self._token))
        echoed = (request.prompt, scores) if request.form.echo_logprobs and scores is not None else None
        return replace(answer, logprobs=completion_logprobs(completion.tokens, beside, self._token, echoed))

    def _token(self, token: int) -> str:
        return self._all.decode([token])

    def _answer(self, completion: Completion) -> Answer:
        form = completion.request.form
        if form == PLAIN:
            return Answer(self._plain.completion(completion))
        marks = (*MARKS.get(form.dialect or "", ()), *(THOUGHTS if form.split_thoughts else ()))
        text, thoughts, count = self._text(completion, marks), None, 0
        if form.split_thoughts:
            whole = text
            thoughts, text = split_reasoning(whole, form.thinking)
            if thoughts is not None:
                ended = THOUGHTS[1] in whole
                count = self._thought_tokens(completion, marks) if ended else len(completion.tokens)
        answer = Answer(text) if form.dialect is None else parse(text, form.dialect)
        content = answer.content
        if content is not None and not form.show_special:
            for mark in self._plain.special.keys() & set(marks):  # found, but in no call
                content = content.replace(mark, "")
        calls = answer.calls if form.parallel_calls else answer.calls[:1]
        content = form.before + (content or "") if form.before else content
        return replace(answer, content=content, calls=calls, reasoning=thoughts, reasoning_tokens=count)

    def _text(self, completion: Completion, marks: Collection[str]) -> str:
        """The text, up to where a stop string or a token ended it, or behind that."""
        request, tokens = completion.request, completion.tokens
        if not marks and not request.form.show_special and not request.form.include_stop:
            return self._plain.completion(completion)
        by_token = completion.text is None or tokens[-1] in request.sampling.stop_token_ids
        if by_token and completion.finish_reason == "stop" and not request.form.include_stop:
            tokens = tokens[:-1]
        shown = self._shown(request, tokens, marks)
        text = self._all.text(request.prompt, tokens[shown])
        if by_token:
            return text
        early = tokens[shown[shown < request.sampling.rules.min_tokens]]
        before = len(self._all.text(request.prompt, early)) if len(early) else 0
        at, stop = first_stop(text, request.sampling.stop, before) or (len(text), "")
        return text[: at + len(stop) * request.form.include_stop]

    def _shown(self, request: Request, tokens: IntArray, marks: Collection[str]) -> IntArray:
        """Indices of the tokens that have text: special ones if they are `marks`, or the request wants all."""
        if request.form.show_special:
            return np.arange(len(tokens), dtype=np.int32)
        hidden = [token for text, token in self._plain.special.items() if text not in marks]
        return np.flatnonzero(~np.isin(tokens, hidden)).astype(np.int32)

    def _thought_tokens(self, completion: Completion, marks: Collection[str]) -> int:
        """How many tokens it took up to the end of the thoughts, its mark included."""
        shown = self._shown(completion.request, completion.tokens, marks)
        tokens = completion.tokens[shown].tolist()
        last = bisect_left(range(len(tokens)), True, key=lambda at: THOUGHTS[1] in self._all.decode(tokens[: at + 1]))
        return int(shown[last]) + 1


class StopFinder:
    """Finds stop strings as tokens come, each at the cost of decoding a few tokens (`CutFinder`).

    A stop string that is a special token stands for that token. What ends with the first `min_tokens` tokens, or within
    them, is no stop string.
    """

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self._tails: WeakKeyDictionary[Request, _Tail] = WeakKeyDictionary()

    def __call__(self, requests: Sequence[Request], outputs: Sequence[IntArray]) -> list[Cut | None]:
        cuts: list[Cut | None] = [None] * len(requests)
        tails = [self._tail(request) for request in requests]
        news = [output[tail.seen :].tolist() for tail, output in zip(tails, outputs, strict=True)]
        for nth in range(max(map(len, news), default=0)):  # one, unless draft tokens were verified
            rows = [row for row, new in enumerate(news) if len(new) > nth and cuts[row] is None]
            reading = [row for row in rows if tails[row].takes(news[row][nth])]
            both = [tokens for row in reading for tokens in (tails[row].with_context, tails[row].pending)]
            texts = iter(self._detokenizer.decode_batch(both))
            found = [row for row in reading if tails[row].reads(next(texts), next(texts))]
            found += [row for row in rows if tails[row].ended]
            for row in found:
                cuts[row] = self._cut(requests[row], tails[row], outputs[row])
        return cuts

    def _tail(self, request: Request) -> "_Tail":
        tail = self._tails.get(request)
        if tail is None:
            tail = self._tails[request] = _Tail(self._detokenizer, request)
        return tail

    def _cut(self, request: Request, tail: "_Tail", output: IntArray) -> Cut | None:
        """Where the first stop string begins in the text of all tokens seen."""
        early = output[: request.sampling.rules.min_tokens]
        if tail.seen <= len(early):
            return None
        text = self._detokenizer.text(request.prompt, output[: tail.seen])
        before = len(self._detokenizer.text(request.prompt, early)) if len(early) else 0
        found = first_stop(text, tail.stops, before)
        if found is None and not tail.ended:
            return None
        return Cut(tail.seen, text if found is None else text[: found[0]])


def first_stop(text: str, stops: Sequence[str], early: int) -> tuple[int, str] | None:
    """Where the first of `stops` stands in `text`, and which it is, if any does.

    One that ends within the first `early` characters does not count: `min_tokens` holds it back, as vLLM does.
    """
    found = [(at, stop) for stop in stops if (at := text.find(stop, max(0, early + 1 - len(stop)))) >= 0]
    return min(found, default=None)


@dataclass
class _Tail:
    """The end of a growing text: enough of it to see a stop string that the next token completes."""

    detokenizer: Detokenizer
    request: InitVar[Request]  # not kept: `StopFinder` forgets a tail with its request
    seen: int = 0  # tokens
    text: str = ""  # all but the last character of the longest stop string fit in
    pending: list[int] = field(default_factory=list)  # tokens that end within a character
    ended: bool = False  # by a special token

    def __post_init__(self, request: Request) -> None:
        special = self.detokenizer.special
        self.stops = request.sampling.stop
        self.stop_ids = {special[stop] for stop in self.stops if stop in special}
        self.skipped = set(special.values()).union(request.sampling.stop_token_ids)
        self.kept = max(map(len, self.stops), default=1) - 1
        self.context, self.before = self.detokenizer.context(request.prompt)

    @property
    def with_context(self) -> list[int]:
        return [*self.context, *self.pending]

    def takes(self, token: int) -> bool:
        """Take in the next token; whether its text is to be read. A stop token, which ends the answer, has none."""
        self.seen += 1
        self.ended = token in self.stop_ids
        if token in self.skipped:
            return False
        self.pending.append(token)
        return True

    def reads(self, whole: str, alone: str) -> bool:
        """Go on by what `with_context` and `pending` decode to; whether the text now holds a stop string."""
        new = added(self.before, whole)
        new = alone if new is None else new
        text = self.text + new
        found = any(stop in text for stop in self.stops)
        if not new.endswith(BROKEN) or len(self.pending) > MOST_PENDING:
            self.text = text[max(0, len(text) - self.kept) :]
            if alone and (new.startswith(BROKEN) or not alone.startswith(BROKEN)):
                self.context, self.before = self.pending, alone
            elif new or not self.before or self.before.endswith(BROKEN):
                # Has no text of its own: a space before a word, the middle or the end of a character.
                self.context, self.before = self.with_context, whole
            self.pending = []
        return found


def added(before: str, whole: str) -> str | None:
    """What tokens add to `before`, the text of those before them, if all together read `whole`. None: not told by these
    texts."""
    if whole.startswith(before):
        return whole[len(before) :]
    sound = before.rstrip(BROKEN)  # the last character of `before` was not whole
    return whole[len(sound) :] if whole.startswith(sound) else None


def token_text(tokens: list[int]) -> str:
    """Token ids as text, where there is no tokenizer."""
    return " ".join(map(str, tokens))


def token_texts(texts: Sequence[list[int]]) -> list[str]:
    """The same of many sequences."""
    return [token_text(tokens) for tokens in texts]
