"""Admissions: how a new sequence is sampled, in words from rank 0 to the last rank.

Most sequences take seven words. Those with rules, a grammar or log-probabilities take more: what they ask for as JSON,
and their tokens so far where the last rank needs them. Each distinct grammar travels once.
"""

import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from deserve.batch import ADMISSION_WORDS, NO_RULES, IntArray, Rules, SamplingParams

HOTTEST = 1e30  # beyond, float32 overflows, and all tokens are equally likely long before
KEPT = 4096  # grammars that both ends remember: the same ones, since both see the same admissions in the same order


@dataclass(frozen=True)
class Extras:
    """What an admission says beyond its first words. `tokens`: prompt and output so far, the prompt `prompt` long.

    `scored`: the log-probabilities of the prompt are wanted.
    """

    min_p: float
    rules: Rules
    grammar: str | None
    logprobs: int | None
    scored: bool
    prompt: int
    tokens: IntArray


class Grammars:
    """The grammars that have travelled: the last `KEPT` used ones, by number. Both ends have the same."""

    def __init__(self) -> None:
        self._texts: OrderedDict[int, str] = OrderedDict()  # least recently used first
        self._numbers: dict[str, int] = {}
        self._count = 0

    def number(self, text: str) -> int | None:
        """The number of a grammar that has travelled, None for another. It counts as used."""
        number = self._numbers.get(text)
        if number is not None:
            self._texts.move_to_end(number)
        return number

    def text(self, number: int) -> str:
        """The grammar of that number. It counts as used."""
        self._texts.move_to_end(number)
        return self._texts[number]

    def add(self, text: str) -> None:
        """A grammar travels."""
        self._texts[self._count], self._numbers[text] = text, self._count
        self._count += 1
        if len(self._texts) > KEPT:
            del self._numbers[self._texts.popitem(last=False)[1]]


class Encoder:
    """Rank 0's end. `ends`: the tokens that end any text."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self._ends = ends
        self._grammars = Grammars()

    def words(self, slot: int, sampling: SamplingParams, prompt: int, tokens: IntArray) -> IntArray:
        """The admission of a sequence in `slot` with these `tokens`, of which `prompt` are its prompt."""
        first = encode_sampling(slot, sampling, prompt)
        if sampling.plain:
            return first
        scored = sampling.prompt_logprobs is not None
        said: dict[str, Any] = {"min_p": sampling.min_p, "logprobs": sampling.logprobs, "prompt": prompt}
        said["scored"] = scored
        if sampling.rules != NO_RULES:
            said["rules"] = asdict(replace(sampling.rules, ends=(*self._ends, *sampling.rules.ends)))
        if sampling.grammar is not None:
            number = self._grammars.number(sampling.grammar)
            said["grammar"] = sampling.grammar if number is None else number
            if number is None:
                self._grammars.add(sampling.grammar)
        text = json.dumps(said).encode()
        text += b" " * (-len(text) % 4)
        needed = sampling.rules.looks_back or sampling.grammar is not None or scored
        return np.concatenate(
            [first, [len(text) // 4], np.frombuffer(text, np.int32), tokens if needed else tokens[:0]]
        ).astype(np.int32)


class Decoder:
    """The last rank's end."""

    def __init__(self) -> None:
        self._grammars = Grammars()

    def extras(self, admission: IntArray) -> Extras | None:
        """What an admission says beyond its first words, None where that is nothing."""
        rest = admission[ADMISSION_WORDS:]
        if not len(rest):
            return None
        count = int(rest[0])
        said = json.loads(np.ascontiguousarray(rest[1 : 1 + count]).tobytes())
        rules = said.get("rules")
        return Extras(
            said["min_p"],
            NO_RULES if rules is None else _rules(rules),
            self._grammar(said.get("grammar")),
            said["logprobs"],
            said["scored"],
            said["prompt"],
            rest[1 + count :],
        )

    def _grammar(self, said: str | int | None) -> str | None:
        if isinstance(said, int):
            return self._grammars.text(said)
        if said is not None:
            self._grammars.add(said)
        return said


def encode_sampling(slot: int, sampling: SamplingParams, prompt: int = 0) -> IntArray:
    """Slot, temperature and top_p (float bits), top_k, seed (low, high), tokens of the prompt."""
    bits = np.array([min(sampling.temperature, HOTTEST), sampling.top_p], np.float32).view(np.int32).tolist()
    seed = np.array([sampling.seed], np.int64).view(np.int32).tolist()
    return np.array([slot, *bits, min(sampling.top_k, 2**31 - 1), *seed, prompt], np.int32)


def extra_words(sampling: SamplingParams, tokens: int) -> int:
    """At most so many words does an admission with so many `tokens` take beyond the first ones."""
    return 0 if sampling.plain else tokens + 64 + len(json.dumps([asdict(sampling.rules), sampling.grammar])) // 4


def _rules(said: dict[str, Any]) -> Rules:
    tuples = {key: tuple(tuple(item) if isinstance(item, list) else item for item in said[key]) for key in _TUPLES}
    return Rules(**(said | tuples))


_TUPLES = ("bias", "allowed", "banned", "ends")
