"""The code of a function on its way to the daemon: a zip that is there, or one of a directory."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import click

from templated.cli.options import Settings
from templated.cli.render import size as shown_size
from templated.errors import InvalidRequest


@contextlib.contextmanager
def archive(settings: Settings, code: str | None) -> Iterator[tuple[bytes | IO[bytes], int]]:
    """The archive of `code`, a directory or a zip, and its size; empty without code."""
    if code is None:
        yield b"", 0
        return
    with contextlib.ExitStack() as stack:
        if os.path.isdir(code):
            stream: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            _zip(code, stream)
        else:
            stream = stack.enter_context(_opened(code))
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if not settings.quiet and sys.stderr.isatty():
            stack.callback(click.echo, "\r\x1b[K", nl=False, err=True)
            stream = cast("IO[bytes]", _Shown(stream, size))
        else:
            settings.note(f"sending {shown_size(size)} of code")
        yield stream, size


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InvalidRequest(
            f"--code: cannot read {path or 'a file without a name'}: {error.strerror}",
            hint="give a directory, or a zip of one, as in: --code ./hello",
        ) from error


def _zip(directory: str, target: IO[bytes]) -> None:
    from templated.drivers.code.archive import zip_directory

    zip_directory(Path(directory), target)


class _Shown:
    """A file that tells on the terminal how much of it was read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size, self._sent = stream, size, 0
        self._told = -1

    def read(self, count: int = -1) -> bytes:
        """As of a file."""
        data = self._stream.read(count)
        self._sent += len(data)
        percent = 100 * self._sent // max(1, self._size)
        if percent != self._told:
            self._told = percent
            text = f"sending {shown_size(self._size)} of code: {percent} %"
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)
        return data
