"""Ways to bring up the same guest, one module each, for `bench compare`."""
