"""The batching policies: data for the one mechanism that fills visits."""

from dataclasses import dataclass
from enum import Enum, auto


class Work(Enum):
    """The kinds of work a visit can be filled with."""

    DECODE = auto()  # sequences that need one more token
    PREFILL = auto()  # prompts that were begun in an earlier visit
    ADMIT = auto()  # prompts that wait outside


@dataclass(frozen=True)
class Policy:
    """In which `order` a visit is filled. `alone`: a visit holds one prompt and nothing else, or decodes."""

    order: tuple[Work, ...]
    alone: bool = False


POLICIES = {
    "vanilla": Policy((Work.PREFILL, Work.ADMIT, Work.DECODE), alone=True),
    "prefill_first": Policy((Work.PREFILL, Work.ADMIT, Work.DECODE)),
    "decode_first": Policy((Work.DECODE, Work.PREFILL, Work.ADMIT)),
}
