"""Runs several jobs, one after the other, in one process group: `job_worker.py FILE`, a JSON list of override lists."""

import json
import sys
from pathlib import Path

from deserve.comm.world import World
from deserve.config import load_config
from deserve.run import run

if __name__ == "__main__":
    world = World()
    statuses = [run(load_config(overrides), world) for overrides in json.loads(Path(sys.argv[1]).read_text())]
    world.leave()
    sys.exit(any(statuses))
