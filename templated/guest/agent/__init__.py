"""The agent inside the guest: newline JSON on the virtio serial port `templated.agent.0`.

Copied into images as a directory, where `python3 -ISu` runs it: standard library only, imports
relative, one thread. wire: what both ends agree on; kernel: what an identity changes; port: lines
in, lines out; execution: commands that run for the host; commands: what a request does. On a
machine with a second disk, for the code of a function, there are more: code: that disk; http and
events: the Runtime API; runtimes: the process that runs the code; functions: what becomes of it
all; rehearsal: the same once before.

The first run of any code after a restore is slow under TCG, which translates it anew: what counts
between a restore and an identity is how much code runs, not how often. So `identify` forks nothing,
imports nothing, uses descriptors that are open already, and does not decode JSON when the line has
the shape that the host gives it; and a frozen agent waits in a plain read. An idle agent has no
timer: everything else waits in one epoll. Every module that is imported is memory of each clone.
"""
