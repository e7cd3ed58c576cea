"""A directory as the zip archive that a deploy takes. It blocks: the command line uses it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from templated.drivers.code.links import fault
from templated.errors import HostError, InvalidRequest
from templated.model.function import MAX_CODE

_TIME = (1980, 1, 1, 0, 0, 0)
"""The first that an archive can hold; what code is made of has no times."""
_PIECE = 1 << 20


def zip_directory(source: Path, target: IO[bytes]) -> None:
    """Write all that is below `source` to `target` as a zip archive, the same for the same files.

    Empty directories and links that stay within `source` are kept. Raises InvalidRequest for what
    code cannot hold (sockets, devices, links that lead out, names that are not UTF-8, more than
    MAX_CODE bytes), HostError for what cannot be read; leaves a part of the archive in `target`.
    """
    try:
        entries = sorted(_walk(source, ""))
        if not entries:
            raise InvalidRequest(f"there is nothing in {source}", hint="give the code's directory")
        links = {name: os.readlink(source / name) for name, mode in entries if stat.S_ISLNK(mode)}
        for name in links:
            if wrong := fault(name, links):
                raise _refused(source / name, wrong)
        _check_size(source, entries)
        with ZipFile(target, "w", ZIP_DEFLATED) as archive:
            for name, mode in entries:
                _add(archive, source, name, mode, links.get(name))
    except OSError as error:
        raise HostError(
            f"cannot read {error.filename or source}: {error.strerror or error}"
        ) from error


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Names below `folder`, and their modes."""
    with os.scandir(folder) as found:
        for entry in found:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise _refused(Path(entry.path), "is neither a file, a directory nor a link")
            try:
                name.encode()
            except UnicodeEncodeError:
                raise _refused(Path(entry.path), "has a name that is not UTF-8") from None
            yield name, mode
            if stat.S_ISDIR(mode):
                yield from _walk(folder / entry.name, f"{name}/")


def _check_size(source: Path, entries: list[tuple[str, int]]) -> None:
    size = sum((source / name).stat().st_size for name, mode in entries if stat.S_ISREG(mode))
    if size > MAX_CODE:
        raise InvalidRequest(
            f"the files in {source} have {size} bytes",
            hint=f"code has at most {MAX_CODE >> 20} MiB of files",
        )


def _add(archive: ZipFile, source: Path, name: str, mode: int, link: str | None) -> None:
    entry = ZipInfo(name, _TIME)
    entry.create_system = 3  # Unix: the mode is in the upper half of external_attr
    entry.compress_type = ZIP_DEFLATED
    if link is not None:
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, os.fsencode(link))
    elif stat.S_ISDIR(mode):
        entry.filename += "/"
        entry.external_attr = (stat.S_IFDIR | 0o755) << 16 | 0x10
        entry.compress_type = 0
        archive.writestr(entry, b"")
    else:
        entry.external_attr = (stat.S_IFREG | (0o755 if mode & 0o111 else 0o644)) << 16
        with open(source / name, "rb") as content, archive.open(entry, "w") as out:
            shutil.copyfileobj(content, out, _PIECE)


def _refused(path: Path, wrong: str) -> InvalidRequest:
    return InvalidRequest(f"{path} {wrong}", hint="leave it out of the code")
