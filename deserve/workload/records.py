"""Reads the files of public data sets: JSON arrays, JSONL (either may be gzipped) and Parquet."""

import gzip
import importlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from deserve.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
CHUNK = 1 << 20  # characters read at once
MB = 10**6


def data_files(path: Path) -> list[Path]:
    """`path` itself, or the data files in it, sorted by name. Raises UserError where there is none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise UserError(f"workload.path={path} holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.is_file():
        raise UserError(f"workload.path={path} does not exist")
    return [path]


def read_records(path: Path, max_mb: float) -> Iterator[Any]:
    """The rows of one file, read when asked for. Raises UserError, naming the file, if it is broken.

    So is a JSON file with a record of much more than `max_mb` million characters, such as a string that does not end.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
            return
        opener = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from _json_values(file, max_mb)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"workload.path: {path} cannot be read: {error}") from error


def _json_values(file: TextIO, max_mb: float) -> Iterator[Any]:
    """The elements of one JSON array, or the values of a file of JSON values, holding little more than one.

    Raises ValueError where the text is not JSON.
    """
    decoder = json.JSONDecoder()
    text, position, is_array, count = "", 0, None, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if is_array is None and position < len(text):
            is_array = text[position] == "["
            position += is_array
            continue
        if is_array and text.startswith("]", position):
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # Perhaps only cut off. Reading as much again as there is keeps the repeated parsing linear.
            rest = text[position:]
            if len(rest) > max(CHUNK, max_mb * MB):
                raise ValueError(f"record {count + 1} is longer than workload.max_line_mb={max_mb:g}") from error
            more = file.read(max(CHUNK, len(rest)))
            if not more:
                if rest or is_array:
                    raise ValueError(f"record {count + 1} is not JSON: {error.msg}") from error
                return
            text, position = rest + more, 0
        else:
            count += 1
            yield value


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"workload.path: {path} needs pyarrow: install it, or give a .jsonl file") from error
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()
