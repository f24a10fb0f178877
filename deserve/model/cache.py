"""The user's cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where models and kernels are kept that were made on this machine. May not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deserve"
