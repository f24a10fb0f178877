"""Public data sets of conversations: each turn of the human, with what was said before, is one chat request.

- `oasst1`, OpenAssistant's conversation trees (arXiv 2304.07327): the history of a turn is its path from the
  root. Both published forms are read: a message per row (`message_id`, `parent_id`, `text`, `role`) and a
  tree per row (`prompt` with nested `replies`). Turns that were deleted, or follow one that was, are left
  out.
- `sharegpt`, conversations with ChatGPT: `{"conversations": [{"from": "human", "value": "..."}, ...]}`, with
  `from` being `human`, `gpt` or `system`.
"""

import importlib
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deserve.errors import RequestError, UserError, brief
from deserve.workload.intake import Intake
from deserve.workload.item import Answered, Item, Rejected
from deserve.workload.records import data_files, read_records
from deserve.workload.schema import CHAT


@dataclass(frozen=True)
class DataSet:
    """Where a data set is published."""

    hub_id: str
    data_file: str | None = None  # which of several files of that repository


SOURCES = {
    "oasst1": DataSet("OpenAssistant/oasst1"),
    "sharegpt": DataSet("anon8231489123/ShareGPT_Vicuna_unfiltered", "ShareGPT_V3_unfiltered_cleaned_split.json"),
}

Messages = list[dict[str, Any]]


def items(
    source: str, path: str | None, intake: Intake, max_record_mb: float, done: Container[str] = ()
) -> Iterator[Item]:
    """The requests of `source` from a file or folder, or without a `path` through the `datasets` library.

    A turn that makes no request becomes a `Rejected`. Raises UserError for missing or broken files.
    """
    records = _hub_records(source) if path is None else _local_records(Path(path).expanduser(), max_record_mb)
    turns = _oasst_turns(records) if source == "oasst1" else _sharegpt_turns(records)
    for line, (name, messages) in enumerate(turns, start=1):
        custom_id = f"{source}-{name}"
        if custom_id in done:
            yield Answered(custom_id)
            continue
        try:
            if isinstance(messages, str):
                raise RequestError("invalid_request", messages)
            yield intake.request(custom_id, line, CHAT, {"messages": messages})
        except RequestError as error:
            yield Rejected(custom_id, line, error.code, f"{custom_id}: {error}")


def _local_records(path: Path, max_mb: float) -> Iterator[Any]:
    for file in data_files(path):
        yield from read_records(file, max_mb)


def _hub_records(source: str) -> Iterable[Any]:
    data_set = SOURCES[source]
    advice = (
        f"download it from https://huggingface.co/datasets/{data_set.hub_id} and set workload.path to the "
        "file or folder, or install the datasets library on a machine with access to the hub"
    )
    try:
        datasets = importlib.import_module("datasets")
        rows: Iterable[Any] = datasets.load_dataset(data_set.hub_id, data_files=data_set.data_file, split="train")
    except Exception as error:  # the library's errors have no common base, and all mean the same here
        raise UserError(f"workload.source={source} is not at hand ({error}): {advice}") from error
    return rows


class _Node(NamedTuple):
    parent: str | None
    role: str
    text: Any
    deleted: bool


def _oasst_turns(records: Iterable[Any]) -> Iterator[tuple[str, Messages | str]]:
    """Id and messages of every prompter's turn, or what is wrong with it.

    Holds all messages at once, as a row's parent may lie anywhere: about 100 MB for the full set's 88,000.
    """
    nodes: dict[str, _Node] = {}
    for record in records:
        for row in _oasst_rows(record):
            node = _Node(row.get("parent_id"), row["role"], row.get("text"), bool(row.get("deleted")))
            nodes.setdefault(row["message_id"], node)
    for message_id, node in nodes.items():
        if node.role != "prompter":
            continue
        path = [node]
        while path[-1].parent in nodes and len(path) <= len(nodes):
            path.append(nodes[path[-1].parent])
        if any(turn.deleted for turn in path):
            continue
        if path[-1].parent is not None:
            yield (
                message_id,
                f"its path does not lead to a root: no message {brief(path[-1].parent)} before it",
            )
            continue
        roles = {"prompter": "user", "assistant": "assistant"}
        yield message_id, [{"role": roles.get(turn.role), "content": turn.text} for turn in reversed(path)]


def _oasst_rows(record: Any) -> Iterator[dict[str, Any]]:
    """The messages of one record, be it a message or a tree, parents first."""
    tree = record.get("prompt") if isinstance(record, dict) else None
    stack = [(tree, None)] if isinstance(tree, dict) else [(record, False)]
    while stack:
        row, parent = stack.pop()
        if isinstance(row, dict) and parent is not False:
            row = row | {"parent_id": parent}
        if not _is_message(row):
            raise UserError("workload.path: not oasst1: a record is neither a message nor a tree of messages")
        yield row
        stack += [(reply, row["message_id"]) for reply in reversed(row.get("replies") or [])]


def _is_message(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("message_id"), str)
        and row["message_id"].isascii()
        and isinstance(row.get("parent_id"), str | None)
        and isinstance(row.get("role"), str)
        and isinstance(row.get("replies"), list | None)
    )


def _sharegpt_turns(records: Iterable[Any]) -> Iterator[tuple[str, Messages | str]]:
    """`I-T` and the messages up to it for turn T of conversation I, from 0 (the set's own ids may repeat)."""
    roles = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }
    for index, record in enumerate(records):
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            yield f"{index}", "not a ShareGPT conversation: conversations must be a list of objects"
            continue
        messages: Messages = []
        for number, turn in enumerate(turns):
            role = turn.get("from")
            role = roles.get(role, role) if isinstance(role, str) else role
            messages.append({"role": role, "content": turn.get("value")})
            if role == "user":
                yield f"{index}-{number}", list(messages)
