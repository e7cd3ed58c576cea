"""Templates: which generation serves, and how the next one is built."""
