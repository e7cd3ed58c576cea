"""Hostile input, made at random within a bound on the time: see `tests.fuzz.cases`."""

import os

LONGER = "TEMPLATED_FUZZ_SECONDS"
SEED = "TEMPLATED_FUZZ_SEED"
SECONDS = float(os.environ.get(LONGER) or 3)
"""For each target."""
