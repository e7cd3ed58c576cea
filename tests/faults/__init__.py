"""The daemon is killed, its calls fail, and its calls hang, at every place that has a name.

A case is a place, what happens there, and what the daemon is doing: `direct-qmp.cont-kill`. The
places are those of `templated.failpoints`.
"""
