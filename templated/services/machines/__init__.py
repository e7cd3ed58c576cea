"""One VM: its slot, its generation, and the way it comes up."""
