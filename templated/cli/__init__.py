"""The command line: each command parses, calls the API over the unix socket, and prints.

It must start fast, so a command's module is imported only when that command runs, and rich,
yaml and the daemon's own modules only where they are used.
"""
