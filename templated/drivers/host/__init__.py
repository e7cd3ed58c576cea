"""What the kernel and the programs of the host report."""
