"""Frozen structs and enums, without I/O. Everything above depends on them, they on nothing."""
