"""Starts the agent: `python3 -ISu DIRECTORY`."""

import os
import sys

if not __package__:
    # Started as a directory, it is no package yet (PEP 366).
    folder, __package__ = os.path.split(sys.path[0])
    sys.path[0] = folder
    # Python 3.12 and later complain when the two differ, in the function's log.
    __spec__ = None

from .commands import Agent
from .execution import ENVIRONMENT
from .kernel import System, has_code, open_port


def main() -> None:
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    os.umask(0o022)
    system = System()
    system.prepare()
    port = open_port()
    agent = Agent(port, port, system)
    if has_code():
        # Not imported where it is not needed: modules are memory of each clone.
        from .code import Drive
        from .rehearsal import Rehearsed

        Rehearsed(agent, Drive())
    print("templated: agent ready", flush=True)
    agent.serve()


if __name__ == "__main__":
    main()
