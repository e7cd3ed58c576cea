"""Demand, forecasts, policy: pure, without I/O and without a clock of its own."""
