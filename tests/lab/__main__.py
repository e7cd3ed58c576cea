"""The command `scripts/lab`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import NoReturn

from tests.lab import image
from tests.lab.guide import install_commands
from tests.lab.machine import Lab, LabError

_TEXT = """\
Starts a Debian 13 with systemd, libvirtd and KVM under emulation, lays this checkout into
/opt/templated there, and ends it when the command has ended: nothing in it is kept. It has no
network but the way in. Needs root, 6 GiB of memory and one core; what takes a second elsewhere
takes some five to ten there.
"""
_EXAMPLES = """\
examples:
  scripts/lab shell                       a shell; the guide's install section has been run
  scripts/lab run templated clone fn-1    one command, with its exit code
  scripts/lab --bare shell                a shell in the lab as it boots, nothing installed
  scripts/lab build                       make the image, unless it is there
  scripts/lab clean                       remove all images that were made

The image is kept in /var/cache/templated-tests/lab; TEMPLATED_TEST_CACHE names another place.
"""


def main() -> int:
    """Run the command line; the exit code is that of the command in the lab."""
    parser = _parser()
    options = parser.parse_args()
    if options.action == "run" and not options.command:
        parser.error("run needs a command")
    if options.action == "clean":
        image.clean()
        return 0
    if os.geteuid() != 0:
        return _fail("the lab needs root: only root makes its image")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        made = image.obtain(_say)
        if options.action == "build":
            print(made.path)
            return 0
        return _with_lab(made, options)
    except KeyboardInterrupt:
        return 130
    except subprocess.CalledProcessError as error:
        return _fail(f"{error.cmd[0]} failed; its output is in {image.cache()}/make.log")
    except LabError as error:
        return _fail(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/lab",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bare", action="store_true", help="install nothing")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("shell", help="an interactive shell in the lab")
    run = actions.add_parser("run", help="run one command in the lab")
    run.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    actions.add_parser("build", help="make the lab's image, unless it is there")
    actions.add_parser("clean", help="remove the images")
    return parser


def _with_lab(made: image.Image, options: argparse.Namespace) -> int:
    started = time.monotonic()
    _say("booting")
    with Lab(made) as lab:
        lab.put_checkout()
        if not options.bare:
            _install(lab)
        _say(f"ready after {time.monotonic() - started:.0f} s")
        if options.action == "shell":
            return subprocess.call([*lab.ssh("-t"), f"cd {image.CHECKOUT} && exec bash -l"])
        return subprocess.call([*lab.ssh(), shlex.join(options.command)])


def _install(lab: Lab) -> None:
    """Run the guide's install section, and show each command before it."""
    for line in install_commands():
        _say(line.partition("  #")[0])
        code = subprocess.call([*lab.ssh(), f"cd {image.CHECKOUT} && {line}"], stdout=sys.stderr)
        if code != 0:
            raise LabError(f"the guide's command ended with {code}: {line}")


def _interrupted(number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr)


def _fail(text: str) -> int:
    _say(text)
    return 1


sys.exit(main())
