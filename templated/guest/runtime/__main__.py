"""Starts the resident Python: `python3 -IB DIRECTORY SOCKET`."""

import os
import sys

if not __package__:
    # Started as a directory, it is no package yet (PEP 366).
    folder, __package__ = os.path.split(sys.path[0])
    sys.path[0] = folder
    # Python 3.12 and later complain when the two differ, in the function's log.
    __spec__ = None

from .serve import Runtime, leave


def main() -> None:
    # What handlers import must not find our modules, nor its own under their names.
    if sys.path[0] == folder:
        del sys.path[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]
    try:
        Runtime(int(sys.argv[1])).run()
    except BaseException as error:  # noqa: BLE001 - a handler may leave by any of them
        leave(error)


if __name__ == "__main__":
    main()
