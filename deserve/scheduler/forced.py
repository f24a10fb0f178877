"""Draft tokens that a grammar leaves no choice about, and how far others keep to it.

Grammars choose tokens on the last rank (`deserve.model.grammar`). The matchers here follow the same answers on rank 0,
and only where drafts are worth a visit's time. What they force is a guess like any other: tokens are forced by their
text, and the model may cut the same text into others.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from deserve.batch import IntArray
from deserve.scheduler.sequences import Sequences

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILED = 256  # distinct grammars that are kept compiled


class Forced:
    """The matchers of sequences with a grammar, by slot. `guide` makes the tokenizer that they need, at the first."""

    def __init__(self, guide: "Callable[[], LLTokenizer]"):
        self._guide = lru_cache(1)(guide)
        self._compiled = lru_cache(COMPILED)(self._compile)
        self._matchers: dict[int, tuple[int, LLMatcher, int]] = {}  # the sequence's age, and tokens taken in

    def _compile(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher

        return LLMatcher(self._guide(), grammar, log_level=0)

    def forget(self, slot: int) -> None:
        """The sequence in `slot` is complete."""
        self._matchers.pop(slot, None)

    def tokens(self, sequences: Sequences, slots: IntArray, most: int) -> IntArray:
        """The first tokens that must follow in each of `slots` [rows], then -1: [rows, most]."""
        forced = np.full((len(slots), most), -1, np.int32)
        for row in np.flatnonzero(sequences.guided[slots]).tolist():
            matcher, guide = self._matcher(sequences, int(slots[row])), self._guide()
            tokens, text = matcher.compute_ff_tokens(), matcher.compute_ff_bytes()
            begin = guide.decode_bytes(tokens)
            if text.startswith(begin):  # what might be part of a longer token is left out, but may be guessed
                tokens += guide.tokenize_bytes(text[len(begin) :])
            tokens = tokens[:most]
            forced[row, : len(tokens)] = tokens
        return forced

    def cut(self, sequences: Sequences, slots: IntArray, drafts: IntArray) -> None:
        """Make `drafts` [rows, n] behind `slots` [rows] -1 from the first on that a grammar does not allow."""
        for row in np.flatnonzero(sequences.guided[slots]).tolist():
            tokens = drafts[row, : int((drafts[row] >= 0).cumprod().sum())]
            drafts[row, self._matcher(sequences, int(slots[row])).validate_tokens(tokens.tolist()) :] = -1

    def _matcher(self, sequences: Sequences, slot: int) -> "LLMatcher":
        """The matcher of the grammar of `slot`, after all tokens of its answer. One that has failed forces nothing."""
        age, matcher, taken = self._matchers.get(slot, (-1, None, 0))
        if matcher is None or age != sequences.age[slot]:
            grammar = sequences.request(slot).sampling.grammar
            assert grammar is not None
            matcher, taken = self._compiled(grammar).deep_copy(), 0
        answer = sequences.output(slot)
        matcher.consume_tokens(answer[taken:].tolist())
        self._matchers[slot] = int(sequences.age[slot]), matcher, len(answer)
        return matcher
