"""`cp`: a file into a clone or out of it."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

import click

from templated.cli.options import Settings, command
from templated.client import requests
from templated.client.blocking import Answer
from templated.errors import InvalidRequest
from templated.model.names import check_clone_name

_REMOTE = re.compile(r"([^/:]*):(.*)", re.DOTALL)

EXAMPLES = """
templated cp handler.py fn-123:/opt/handler.py
templated cp handler.py fn-123:/opt/
templated cp fn-123:/var/log/syslog .
templated cp fn-123:/etc/hostname -
"""


@command("cp", examples=EXAMPLES)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.pass_obj
def cp(settings: Settings, source: str, target: str) -> None:
    """Copy one file into a clone or out of it.

    One side is NAME:/path, the other a local path, or - for stdin or stdout. A target that ends
    in '/' is a directory. A local file whose name has a ':' is written as ./a:b.
    """
    remote_source, remote_target = _REMOTE.fullmatch(source), _REMOTE.fullmatch(target)
    if bool(remote_source) == bool(remote_target):
        raise InvalidRequest(
            "one side has to be in a clone and the other here",
            hint="as in: templated cp file.txt fn-123:/tmp/file.txt",
        )
    if remote_target:
        _upload(settings, source, *_guest_path(remote_target))
    elif remote_source:
        _download(settings, *_guest_path(remote_source), target)


def _guest_path(match: re.Match[str]) -> tuple[str, str]:
    name, path = match[1], match[2]
    if not path.startswith("/"):
        raise InvalidRequest(
            f"{match[0]}: a path in a clone has to be absolute", hint=f"as in {name}:/tmp/file"
        )
    return check_clone_name(name), path


def _upload(settings: Settings, source: str, name: str, path: str) -> None:
    if path.endswith("/"):
        if source == "-":
            raise InvalidRequest(f"{name}:{path} is a directory", hint="give a file name for stdin")
        path += os.path.basename(source)
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] = sys.stdin.buffer
        if source != "-":
            stream = stack.enter_context(open(source, "rb"))
        status = os.fstat(stream.fileno())
        mode, size = 0o644, None
        if stat.S_ISREG(status.st_mode) and source != "-":
            mode, size = stat.S_IMODE(status.st_mode) & 0o777, status.st_size
        request = requests.put_file(name, path, stream, mode=mode, size=size)
        settings.client().json(request)
    settings.note(f"copied {source} to {name}:{path}")


def _download(settings: Settings, name: str, path: str, target: str) -> None:
    if target != "-" and (os.path.isdir(target) or target.endswith("/")):
        target = os.path.join(target, os.path.basename(path))
    with settings.client().open(requests.get_file(name, path)) as answer:
        if target == "-":
            _write(answer, sys.stdout.buffer)
            return
        with _replaced(target) as stream:
            _write(answer, stream)
    settings.note(f"copied {name}:{path} to {target}")


def _write(answer: Answer, stream: IO[bytes]) -> None:
    for chunk in answer.chunks():
        stream.write(chunk)
    stream.flush()


@contextlib.contextmanager
def _replaced(target: str) -> Iterator[IO[bytes]]:
    """Open `target` for writing; an old file stays until the new one is complete."""
    if os.path.exists(target) and not os.path.isfile(target):  # a device, or a pipe
        with open(target, "wb") as stream:
            yield stream
        return
    target = os.path.realpath(target)
    directory, base = os.path.split(target)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{base[:200]}.", delete=False) as part:
        try:
            yield part
            part.flush()
            os.fchmod(part.fileno(), _mode(target))
            os.replace(part.name, target)
        except BaseException:
            os.unlink(part.name)
            raise


def _mode(target: str) -> int:
    """The mode of the file that is replaced, or that of a new file."""
    try:
        return stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
