"""Clones: their registry, their start, and what one can do in them."""
