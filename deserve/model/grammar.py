"""Structured output: which tokens may come next, by a grammar for each sequence that has one.

The matchers live on the last rank, where tokens are chosen, so no mask ever crosses a link. Grammars are llguidance's:
JSON schemas, regular expressions and context-free grammars, compiled in milliseconds.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens
from numpy.typing import NDArray

from deserve.batch import IntArray
from deserve.errors import RequestError
from deserve.staging import to_device

MASKED_BYTES = 64 << 20  # of unpacked masks at a time
COMPILED = 4096  # distinct grammars that are kept compiled


class _Sampled(NamedTuple):
    """Tokens of one sequence on their way from the device to the host; all but the last take a draft's place."""

    tokens: torch.Tensor
    at: slice
    drafts: list[int]
    arrived: torch.cuda.Event | None

    def kept(self) -> list[int]:
        """Those that count: the first, and each that follows a draft token which was right."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens: list[int] = self.tokens[self.at].tolist()
        wrong = (nth for nth, draft in enumerate(self.drafts) if draft != tokens[nth])
        return [token for token in tokens[: next(wrong, len(self.drafts)) + 1] if token >= 0]  # UNDECIDED is none


Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]


def checked_grammar(kind: Kind, text: Any, compact: bool = False, tokenizer: LLTokenizer | None = None) -> str:
    """The grammar that `text` describes, as `Grammars` takes it; if `compact`, of JSON without white space in it.

    Raises RequestError, with the compiler's words, for one that cannot be compiled.
    """
    from llguidance import grammar_from

    try:
        if kind == "json_schema" and compact:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        else:
            grammar = str(grammar_from(kind, text))
    except ValueError as error:
        raise RequestError("invalid_grammar", f"the {kind} cannot be compiled: {error}") from None
    problem = LLMatcher.validate_grammar(grammar, tokenizer)
    if problem and not problem.startswith("WARNING"):
        raise RequestError("invalid_grammar", f"the {kind} cannot be compiled: {problem}")
    return grammar


class Grammars:
    """The matchers of the sequences in flight, by slot."""

    def __init__(self, tokenizer: LLTokenizer, device: torch.device):
        self._device = device
        self._compiled = lru_cache(COMPILED)(lambda grammar: LLMatcher(tokenizer, grammar, log_level=0))
        self._executor, self._known = LLExecutor(), tokenizer.vocab_size
        self._matchers: dict[int, LLMatcher] = {}
        self._sampled: dict[int, _Sampled] = {}  # by slot: the tokens that its matcher has yet to take in
        self._bits = torch.arange(32, dtype=torch.int32, device=device)
        self._masks = torch.zeros(0, dtype=torch.int32)
        self._applied: torch.cuda.Event | None = None  # when the device has read them

    def admit(self, slot: int, grammar: str | None, output: IntArray) -> None:
        """A new sequence in `slot`, with the `output` tokens that it has already; None: no grammar binds it."""
        self.forget(slot)
        if grammar is not None:
            self._matchers[slot] = self._compiled(grammar).deep_copy()
            self._matchers[slot].consume_tokens(output.tolist())

    def forget(self, slot: int) -> None:
        """A sequence without a grammar takes `slot`."""
        self._matchers.pop(slot, None)
        self._sampled.pop(slot, None)

    def rows(self, slots: IntArray) -> NDArray[np.int64]:
        """Which of the rows `slots` [n] have a grammar."""
        if not self._matchers:
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.array([slot in self._matchers for slot in slots.tolist()]))

    def record(self, tokens: torch.Tensor, slots: IntArray, assumed: IntArray) -> None:
        """The sequences in `slots` [n], which all have grammars, were given `tokens` [n], which lie on the device.

        `assumed` [n] as in `Sampler.sample`.

        Their copy to the host is awaited at the next visit: rank 0 has seen them by then, so it is there.
        """
        arrived = None
        if tokens.is_cuda:
            copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            copy.copy_(tokens, non_blocking=True)
            tokens, arrived = copy, torch.cuda.Event()
            arrived.record()
        for at in _runs(slots):
            self._sampled[int(slots[at.start])] = _Sampled(tokens, at, assumed[at][:-1].tolist(), arrived)

    def masks(self, slots: IntArray, assumed: IntArray, vocab: int) -> NDArray[np.int32]:
        """Which of `vocab` tokens may come next in `slots` [n], a bit each: [n, vocab / 32].

        The rows of a slot lie side by side, each after the token `assumed` [n] in the row before it. None may behind a
        token that the grammar does not allow, nor where a matcher has failed: a grammar can take more steps than its
        limits allow. They are valid until the next call.
        """
        masks = self._zeros(len(slots), -(-self._known // 32))  # as llguidance wants them
        sound = []
        for at in _runs(slots):
            matcher = self._matchers[int(slots[at.start])]
            sampled = self._sampled.pop(int(slots[at.start]), None)
            if sampled is not None:
                matcher.consume_tokens(sampled.kept())
            if not matcher.is_error():
                sound.append((matcher, at.start, assumed[at][:-1].tolist()))
        alone = [(matcher, row) for matcher, row, drafts in sound if not drafts]
        drafted = [(matcher, row, drafts) for matcher, row, drafts in sound if drafts]
        if alone:
            fill_next_token_bitmask_par(self._executor, alone, masks)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, masks)
        unknown = -(-vocab // 32) - masks.shape[1]  # of the model, beyond the tokenizer's
        return np.pad(masks, ((0, 0), (0, unknown))) if unknown > 0 else masks

    def _zeros(self, rows: int, words: int) -> NDArray[np.int32]:
        """Zeros [rows, words] in memory that is used again: touching new memory takes longer than filling masks."""
        if self._applied is not None:
            self._applied.synchronize()
        if self._masks.numel() < rows * words:
            self._masks = torch.empty(rows * words, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        masks = self._masks[: rows * words].view(rows, words).zero_()
        zeros: NDArray[np.int32] = masks.numpy()
        return zeros

    def apply(self, logits: torch.Tensor, masks: NDArray[np.int32]) -> torch.Tensor:
        """`logits` [n, vocab], changed in place: tokens that `masks` [n, vocab / 32] rule out cannot be chosen."""
        vocab = logits.shape[1]
        few = max(1, MASKED_BYTES // (4 * vocab))
        for begin in range(0, len(masks), few):
            some = masks[begin : begin + few]
            if logits.is_cuda:  # bits cross the bus
                closed = (to_device(some, self._device)[:, :, None] >> self._bits) & 1 == 0
            else:
                closed = torch.from_numpy(np.unpackbits(~some.view(np.uint8), axis=1, bitorder="little")).view(
                    torch.bool
                )
            logits[begin : begin + few].masked_fill_(closed.view(len(some), -1)[:, :vocab], -torch.inf)
        if logits.is_cuda:
            self._applied = torch.cuda.Event()
            self._applied.record()
        return logits


def _runs(slots: IntArray) -> list[slice]:
    """Where the same slot stands side by side."""
    starts = np.flatnonzero(np.diff(slots, prepend=-1)).tolist()
    return [slice(begin, end) for begin, end in zip(starts, [*starts[1:], len(slots)], strict=True)]
