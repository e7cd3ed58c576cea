"""Measures `templated.scaling` on a virtual clock."""
