"""Work that is done in intervals, beside requests."""
