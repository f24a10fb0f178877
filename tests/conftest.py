"""What all tests share."""

import os

# Read when the OpenMP runtime starts, so before torch is imported: on a small machine idle threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
