"""A rank whose hub cache is its own, as on a host of its own: `hub_worker.py FOLDER [overrides]`.

The cache of rank r is FOLDER/rank<r>. Nothing is fetched: the hub counts as out of reach.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Read when the hub's library is imported
    os.environ |= {"HF_HOME": str(Path(sys.argv.pop(1)) / f"rank{os.environ['RANK']}"), "HF_HUB_OFFLINE": "1"}

    from deserve.run import main

    sys.exit(main())
