"""QEMU: its command line, its control channel, its accelerators."""
