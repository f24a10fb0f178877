"""What all tests share."""

import os

from hypothesis import HealthCheck, settings

# Read when the OpenMP runtime starts, so before torch is imported: on a small machine idle threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The same examples in every run, however slow the machine is: a test fails because of a change, never by chance.
# `pytest --hypothesis-profile=search` looks for new ones.
lenient = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("search", deadline=None, suppress_health_check=lenient)
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")
