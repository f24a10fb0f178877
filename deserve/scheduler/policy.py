"""The batching policies: data for the one mechanism that fills visits."""

from dataclasses import dataclass
from enum import Enum, auto


class Fill(Enum):
    """What a visit can be filled with."""

    DECODE = auto()  # sequences that need one more token
    PREFILL = auto()  # prompts that were begun in an earlier visit
    ADMIT = auto()  # prompts that wait outside


@dataclass(frozen=True)
class Policy:
    """In which `order` a visit is filled. `alone`: a visit holds one prompt and nothing else, or decodes."""

    order: tuple[Fill, ...]
    alone: bool = False


POLICIES = {
    "vanilla": Policy((Fill.PREFILL, Fill.ADMIT, Fill.DECODE), alone=True),
    "prefill_first": Policy((Fill.PREFILL, Fill.ADMIT, Fill.DECODE)),
    "decode_first": Policy((Fill.DECODE, Fill.PREFILL, Fill.ADMIT)),
}
