"""Hostile input, made at random within a bound on the time: see `tests.fuzz.cases`."""
