"""Runs several jobs, one after the other, in one process group: `job_worker.py FILE`, a JSON list of override lists.

The first job measures the ranks. The others plan with its times, whatever their model: their answers are tested, not
their speed, and a survey takes longer than most of them.
"""

import json
import sys
from pathlib import Path
from typing import Any

from deserve.comm.world import World
from deserve.config import load_config
from deserve.planner import survey
from deserve.run import run


def lend_survey(first: Path) -> None:
    """Let every survey take its times from the file `first` once that exists, the same for all kinds of layers."""

    def lent(kept: Path | None, key: dict[str, Any]) -> list[Any] | None:
        if not first.exists():
            return None
        stages: list[Any] = json.loads(first.read_text())[0]["stages"]
        *_, kinds = key["model"]
        for times, _ in stages:
            times["layers"] = times["layers"][:1] * (1 + max(kinds))
        return stages

    survey.read_kept = lent


def refuse_pickles(event: str, arguments: tuple[object, ...]) -> None:
    """What comes over a link or from a model's folder is data, never code: no job looks up what a pickle names."""
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickles {arguments}")


if __name__ == "__main__":
    sys.addaudithook(refuse_pickles)
    configs = [load_config(overrides) for overrides in json.loads(Path(sys.argv[1]).read_text())]
    lend_survey(Path(configs[0].output.dir) / "survey.json")
    world = World()
    statuses = [run(config, world) for config in configs]
    world.leave()
    sys.exit(any(statuses))
