"""From output tokens to text: what a completion reads as behind its prompt, and where a stop string ends it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from deserve.batch import Completion, IntArray, Request
from deserve.model.tokenizer import ByteTokenizer, Tokenizer

BROKEN = "\ufffd"  # stands for bytes that are no character, or not yet one
CONTEXT = range(8, 33)  # last tokens of a prompt to decode with
MOST_PENDING = 16  # tokens of a character that does not become whole: nothing needs so many


class Detokenizer:
    """Decodes the outputs of one job. Special tokens have no text; without a tokenizer, text is token ids."""

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer | None):
        self.special: dict[str, int] = tokenizer.special_tokens if tokenizer is not None else {}
        self.decode: Callable[[Sequence[int]], str] = tokenizer.decode if tokenizer is not None else token_text
        self._reads_on = tokenizer is not None

    def text(self, prompt: IntArray, tokens: IntArray) -> str:
        """The text of output `tokens`, such that it continues the text of `prompt`.

        A decoder drops the space before a text's first word (SentencePiece's do), and bytes on both sides of the
        border may be one character, so the tokens are decoded behind the prompt's last ones.
        """
        context, before = self.context(prompt)
        return self.added(before, context, tokens.tolist())

    def completion(self, completion: Completion) -> str:
        """The text of an answer. The token that ended it is no part of it, even if it is an ordinary one."""
        if completion.text is not None:
            return completion.text
        ended = completion.finish_reason == "stop" and self._reads_on
        return self.text(completion.request.prompt, completion.tokens[:-1] if ended else completion.tokens)

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

    def added(self, before: str, context: list[int], tokens: list[int]) -> str:
        """What `tokens` add to `before`, the text of `context`."""
        text = self.decode([*context, *tokens])
        if text.startswith(before):
            return text[len(before) :]
        # The last character of `before` was not whole.
        whole = before.rstrip(BROKEN)
        return text[len(whole) :] if text.startswith(whole) else self.decode(tokens)


class StopFinder:
    """Finds stop strings as tokens come, each at the cost of decoding a few tokens.

    Called with a request and its output so far, it gives the text before the first of the request's stop strings,
    None where there is none yet. A stop string that is a special token stands for that token.
    """

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self._tails: WeakKeyDictionary[Request, _Tail] = WeakKeyDictionary()

    def __call__(self, request: Request, tokens: IntArray) -> str | None:
        detokenizer = self._detokenizer
        tail = self._tails.get(request)
        if tail is None:
            tail = self._tails[request] = _Tail(detokenizer, request)
        for token in tokens[tail.seen :].tolist():
            tail.seen += 1
            if token in tail.stop_ids:
                return detokenizer.text(request.prompt, tokens[: tail.seen])
            if tail.ends_with_stop(token):
                text = detokenizer.text(request.prompt, tokens[: tail.seen])
                cuts = [at for stop in tail.stops if (at := text.find(stop)) >= 0]
                if cuts:
                    return text[: min(cuts)]
        return None


@dataclass
class _Tail:
    """The end of a growing text: enough of it to see a stop string that the next token completes."""

    detokenizer: Detokenizer
    request: Request
    seen: int = 0  # tokens
    text: str = ""  # all but the last character of the longest stop string fit in
    pending: list[int] = field(default_factory=list)  # tokens that end within a character

    def __post_init__(self) -> None:
        special = self.detokenizer.special
        self.stops = self.request.sampling.stop
        self.stop_ids = {special[stop] for stop in self.stops if stop in special}
        self.skipped = set(special.values())
        self.kept = max(map(len, self.stops)) - 1
        self.context, self.before = self.detokenizer.context(self.request.prompt)

    def ends_with_stop(self, token: int) -> bool:
        """Take in the next token; whether the text now holds a stop string."""
        if token in self.skipped:
            return False
        self.pending.append(token)
        added = self.detokenizer.added(self.before, self.context, self.pending)
        text = self.text + added
        found = any(stop in text for stop in self.stops)
        if not added.endswith(BROKEN) or len(self.pending) > MOST_PENDING:
            self.text = text[max(0, len(text) - self.kept) :]
            alone = self.detokenizer.decode(self.pending)
            if alone and (added.startswith(BROKEN) or not alone.startswith(BROKEN)):
                self.context, self.before = self.pending, alone
            elif added or not self.before:  # has no text of its own: a space before a word, the end of a character
                self.context = [*self.context, *self.pending]
                self.before = self.detokenizer.decode(self.context)
            self.pending = []
        return found


def token_text(tokens: Sequence[int]) -> str:
    """Token ids as text, where there is no tokenizer."""
    return " ".join(map(str, np.asarray(tokens).tolist()))
