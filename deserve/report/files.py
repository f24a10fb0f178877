"""Small files that a reader, or a crash, never sees half written."""

import os
from pathlib import Path


def replace_file(path: Path, *data: bytes) -> None:
    """Give the file at `path` the content `data` in one step: a crash leaves the old file or the new one.

    Raises OSError, and leaves the old file, where that fails.
    """
    scratch = path.with_suffix(".tmp")
    try:
        with scratch.open("wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        if scratch.is_file():  # empty or half, where the disk is full
            scratch.unlink()
        raise
