"""Logits processors: what a request changes in its logits before a token is chosen.

They run on the last rank, for the rows that ask for them; other rows pay nothing. The order is vLLM's, so that a
request file gives the same distribution there and here: allowed tokens, banned words, minimum length, bias, penalties.
Penalties need the sequence's tokens: those sampled here stay on the device, since no visit waits for the host to learn
them.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from deserve.batch import NO_RULES, IntArray, Rules
from deserve.staging import to_device

COUNTED_BYTES = 64 << 20  # of token counts [rows, vocab] at a time


class Processors:
    """The rules of the sequences in flight, by slot, and the tokens that these rules look back at."""

    def __init__(self, slots: int, device: torch.device):
        self._device = device
        self._rules: dict[int, Rules] = {}
        self._prompt = np.zeros(slots, np.int64)  # tokens of each sequence's prompt
        self._history = torch.zeros(slots, 0, dtype=torch.int64, device=device)  # [slots, width] tokens by position

    def admit(self, slot: int, rules: Rules, prompt: int, tokens: IntArray) -> None:
        """A new sequence in `slot`: `tokens` are its prompt of `prompt` tokens, and the output that it has already."""
        self._rules.pop(slot, None)
        if rules == NO_RULES:
            return
        self._rules[slot] = rules
        self._prompt[slot] = prompt
        if rules.looks_back:
            self._widen(len(tokens))
            self._history[slot, : len(tokens)] = to_device(tokens.astype(np.int64), self._device)

    def forget(self, slot: int) -> None:
        """A sequence without rules takes `slot`."""
        self._rules.pop(slot, None)

    def rows(self, slots: IntArray) -> NDArray[np.int64]:
        """Which of the rows `slots` [n] have rules."""
        if not self._rules:
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.array([slot in self._rules for slot in slots.tolist()]))

    def apply(self, logits: torch.Tensor, slots: IntArray, positions: IntArray) -> torch.Tensor:
        """Float32 `logits` [n, vocab], changed in place, by the rules of `slots` [n], which all have some.

        `positions` [n]: where in its sequence the token to be chosen will stand.
        """
        rules = [self._rules[slot] for slot in slots.tolist()]
        self._allow(logits, rules)
        self._ban(logits, rules, slots, positions)
        self._postpone_ends(logits, rules, positions - self._prompt[slots])
        entries = [(row, token, bias) for row, of in enumerate(rules) for token, bias in of.bias]
        if entries:
            row, token, bias = zip(*entries, strict=True)
            logits.index_put_((self._index(row), self._index(token)), self._values(bias), accumulate=True)
        penalised = np.flatnonzero([of.penalises for of in rules])
        few = max(1, COUNTED_BYTES // (4 * logits.shape[1]))
        for begin in range(0, len(penalised), few):
            some = penalised[begin : begin + few]
            self._penalise(logits, some, [rules[row] for row in some.tolist()], slots[some], positions[some])
        return logits

    def record(self, tokens: torch.Tensor, slots: IntArray, positions: IntArray) -> None:
        """The `tokens` [n] on the device now stand at `positions` [n] of the sequences in `slots` [n].

        For what is no token any will do: what a visit planned ahead samples behind it is dropped.
        """
        kept = np.flatnonzero([slot in self._rules and self._rules[slot].looks_back for slot in slots.tolist()])
        if len(kept):
            self._widen(int(positions[kept].max()) + 1)
            at = self._index(slots[kept]), self._index(positions[kept])
            self._history.index_put_(at, tokens.index_select(0, self._index(kept)).long().clamp(min=0))

    def _allow(self, logits: torch.Tensor, rules: list[Rules]) -> None:
        rows = [row for row, of in enumerate(rules) if of.allowed]
        if rows:
            shut = torch.ones(len(rows), logits.shape[1], dtype=torch.bool, device=self._device)
            open_ = [(nth, token) for nth, row in enumerate(rows) for token in rules[row].allowed]
            nth, token = zip(*open_, strict=True)
            shut[self._index(nth), self._index(token)] = False
            at = self._index(rows)
            logits.index_copy_(0, at, logits.index_select(0, at).masked_fill_(shut, -torch.inf))

    def _ban(self, logits: torch.Tensor, rules: list[Rules], slots: IntArray, positions: IntArray) -> None:
        words = [(row, word) for row, of in enumerate(rules) for word in of.banned]
        for length in {len(word) for _, word in words}:
            of_length = [(row, word) for row, word in words if len(word) == length and length <= positions[row]]
            if not of_length:
                continue
            rows = np.array([row for row, _ in of_length])
            ids = self._index(np.array([word for _, word in of_length]))
            before = positions[rows][:, None] + np.arange(1 - length, 0)
            history = (
                self._history[self._index(slots[rows])[:, None], self._index(before)] if length > 1 else ids[:, :0]
            )
            completes = (history == ids[:, :-1]).all(1)
            at = self._index(rows), ids[:, -1]
            # Several words of a row may end in the same token: adding -inf or 0 does not depend on the order.
            penalty = torch.zeros(len(rows), device=self._device).masked_fill_(completes, -torch.inf)
            logits.index_put_(at, penalty, accumulate=True)

    def _postpone_ends(self, logits: torch.Tensor, rules: list[Rules], outputs: IntArray) -> None:
        early = [(row, end) for row, of in enumerate(rules) if outputs[row] < of.min_tokens for end in of.ends]
        if early:
            row, end = zip(*early, strict=True)
            logits[self._index(row), self._index(end)] = -torch.inf

    def _penalise(
        self, logits: torch.Tensor, rows: NDArray[np.int64], rules: list[Rules], slots: IntArray, positions: IntArray
    ) -> None:
        at, vocab = self._index(rows), logits.shape[1]
        x = logits.index_select(0, at)
        width = int(positions.max())
        history = self._history[self._index(slots), :width]
        place = torch.arange(width, device=self._device)
        begin, end = self._index(self._prompt[slots])[:, None], self._index(positions)[:, None]

        def counts(of: torch.Tensor) -> torch.Tensor:
            found = x.new_zeros(len(rows), vocab + 1)  # the last column takes what does not count
            found.scatter_add_(1, history.masked_fill(~of, vocab), x.new_ones(()).expand_as(history))
            return found[:, :vocab]

        def column(of: Callable[[Rules], float]) -> torch.Tensor:
            return self._values([of(rule) for rule in rules])[:, None]

        if any(rule.repetition_penalty != 1 for rule in rules):
            penalty = column(lambda rule: rule.repetition_penalty)
            x = torch.where(counts(place < end) > 0, torch.where(x > 0, x / penalty, x * penalty), x)
        output = counts((place >= begin) & (place < end))
        x -= column(lambda rule: rule.frequency_penalty) * output
        x -= column(lambda rule: rule.presence_penalty) * (output > 0)
        logits.index_copy_(0, at, x)

    def _widen(self, width: int) -> None:
        slots, now = self._history.shape
        if width > now:
            wider = self._history.new_zeros(slots, max(width, 2 * now))
            wider[:, :now] = self._history
            self._history = wider

    def _index(self, values: object) -> torch.Tensor:
        return to_device(np.asarray(values, np.int64), self._device)

    def _values(self, values: object) -> torch.Tensor:
        return to_device(np.asarray(values, np.float32), self._device)


def log_probabilities(
    logits: torch.Tensor, tokens: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row of `logits` [n, vocab]: the log-probability of `tokens` [n], and the `top` likeliest tokens.

    Returns float32 [n], int64 ids [n, top] and float32 [n, top], likeliest first. They are of the model's own logits,
    before processors and temperature, as in OpenAI's API and by vLLM's default.
    """
    ids = likeliest(logits, top)
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    values = logits.gather(1, ids)
    chosen = logits.gather(1, tokens.long()[:, None])
    return (chosen - total)[:, 0], ids, values - total


def likeliest(logits: torch.Tensor, top: int, block: int = 128) -> torch.Tensor:
    """The `top` largest entries of each row of `logits` [n, vocab], the largest first: int64 ids [n, top].

    They lie in the `top` blocks with the largest maxima, so most of the vocabulary is read once and never sorted.
    """
    n, vocab = logits.shape
    if vocab % block or vocab // block <= top:
        return logits.topk(top, dim=-1).indices
    blocks = logits.view(n, -1, block)
    near = blocks.amax(-1).topk(top, dim=-1).indices
    at = blocks.gather(1, near[:, :, None].expand(-1, -1, block)).flatten(1).topk(top, dim=-1).indices
    return near.gather(1, at // block) * block + at % block


def ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The rank of `tokens` [n], 1 for the likeliest, each by its row of `logits` [n, vocab]: int64 [n]."""
    return 1 + (logits > logits.gather(1, tokens.long()[:, None])).sum(-1)
