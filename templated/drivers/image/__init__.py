"""Disk layer 1: Debian images."""
