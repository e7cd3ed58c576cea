"""The state machines: templates and their generations, clones and their slots."""
