"""Templates and their generations, clones and their slots: the parts that have states."""
