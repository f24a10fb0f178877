"""Synthetic workloads, `fixedCOUNT:LENGTH:VARIATION`: random token ids, the same in every run."""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deserve.batch import Request, SamplingParams
from deserve.errors import UserError
from deserve.workload.item import Answered, Lengths, Limits
from deserve.workload.sampling import TO_THE_END, with_derived_seed

STEM_SEED = 2**32  # beyond every index
PATTERN = re.compile(r"fixed([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})")


@dataclass(frozen=True)
class Fixed:
    """`count` prompts of `length` plus or minus up to `variation` tokens, the first `shared` the same in all."""

    count: int
    length: int
    variation: int
    shared: int = 0

    @classmethod
    def parse(cls, source: str, shared: int = 0) -> "Fixed":
        """Raises UserError, naming `workload.source`, for a malformed string, or where prompts may be shorter than
        `shared`."""
        match = PATTERN.fullmatch(source)
        if match is None:
            if Path(source).expanduser().is_dir():
                raise UserError(f"workload.source={source} is a folder: name the .jsonl file in it")
            raise UserError(
                f"workload.source={source} is no file, no data set, and does not read fixedCOUNT:LENGTH:VARIATION, as "
                "in fixed512:256:0 (512 prompts of 256 tokens, give or take none)"
            )
        count, length, variation = map(int, match.groups())
        if count < 1 or variation >= length:
            raise UserError(f"workload.source={source} must ask for at least one prompt, each of at least one token")
        if shared > length - variation:
            raise UserError(
                f"workload.shared_tokens={shared} is more than the {length - variation} tokens of the shortest prompt "
                f"of workload.source={source}"
            )
        return cls(count, length, variation, shared)

    def check_fits(self, limits: Limits, max_tokens: int) -> None:
        """Raises UserError where the longest prompt and its answer exceed the model's context."""
        longest = self.length + self.variation
        to_the_end = max_tokens == TO_THE_END
        if longest + (1 if to_the_end else max_tokens) > limits.max_context:
            raise UserError(
                f"workload.source has prompts of up to {longest} tokens; with "
                f"sampling.max_tokens={'null' if to_the_end else max_tokens} that is more than the "
                f"{limits.max_context} tokens that the model takes: lower one of them"
            )

    def requests(
        self, limits: Limits, defaults: SamplingParams, done: Container[str] = ()
    ) -> Iterator[Request | Answered]:
        """The prompts `fixed-0`, `fixed-1`, ...; each depends on its index, the vocabulary size and `shared` alone."""
        stem = np.random.default_rng(STEM_SEED).integers(limits.vocab_size, size=self.shared, dtype=np.int32)
        for index in range(self.count):
            custom_id = f"fixed-{index}"
            if custom_id in done:
                yield Answered(custom_id)
                continue
            random = np.random.default_rng(index)
            length = random.integers(self.length - self.variation, self.length + self.variation, endpoint=True)
            prompt = random.integers(limits.vocab_size, size=length, dtype=np.int32)
            prompt[: self.shared] = stem
            sampling = with_derived_seed(defaults, custom_id)
            room = limits.max_context - int(length)
            yield Request(custom_id, prompt, replace(sampling, max_tokens=min(sampling.max_tokens, room)))

    def lengths(self, limits: Limits, max_tokens: int, limit: int | None = None) -> Lengths:
        """Those of the distribution, of which the first `limit` prompts are taken."""
        count = self.count if limit is None else min(self.count, limit)
        answer = min(max_tokens, limits.max_context - self.length)
        total = min(self.length + self.variation + max_tokens, limits.max_context)
        return Lengths(count, float(self.length), float(answer), total)
