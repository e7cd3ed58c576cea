"""VMs that are ready before anyone asks."""
