"""Runs commands of the installed `templated` in the lab: a line of JSON in, a line of JSON out.

Each is a child of this process, in which the modules are imported already: to import them takes the
emulated CPU some seconds, and a run of the lab's tests has hundreds of commands.
"""

import importlib
import json
import os
import pkgutil
import sys
import tempfile

import templated.cli
from templated.cli.main import main


def run(argv: list[str]) -> list[int | str]:
    """Run one command; returns its exit code, stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                null = os.open(os.devnull, os.O_RDONLY)
                for source, target in ((null, 0), (out.fileno(), 1), (err.fileno(), 2)):
                    os.dup2(source, target)
                code = main(argv)
                sys.stderr.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        texts: list[str] = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return [os.waitstatus_to_exitcode(status), *texts]


# What they import when they run comes with them: aiohttp, rich, yaml.
for module in pkgutil.iter_modules(templated.cli.__path__, "templated.cli."):
    importlib.import_module(module.name)
for line in sys.stdin.buffer:
    sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
    sys.stdout.flush()
