"""What runs the virtual machines: `qemu`, and `fake` for tests of logic that needs no VM."""
