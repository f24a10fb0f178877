"""Workloads: where requests come from, and what becomes of lines that are none."""

from deserve.workload.item import Answered, Item, Lengths, Limits, Rejected, Tokenizer
from deserve.workload.sampling import default_sampling
from deserve.workload.source import check_source, data_paths, open_workload, peek_lengths

__all__ = [
    "Answered",
    "Item",
    "Lengths",
    "Limits",
    "Rejected",
    "Tokenizer",
    "check_source",
    "data_paths",
    "default_sampling",
    "open_workload",
    "peek_lengths",
]
