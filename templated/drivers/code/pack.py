"""Makes a code image from a zip archive: a program, `pack ARCHIVE FOLDER CALLER`.

A process of its own, since it reads what anybody sends: it bounds its own memory, time and files,
and ends with its caller, whose process id it is told. FOLDER is empty, and the caller's to remove:

    FOLDER/tree    the files, with modes that follow from their x bits alone
    FOLDER/image   erofs, uncompressed, made from them; then extended by a hole to VIRTUAL_SIZE

It prints one line of JSON: the record of the image, or {"error": "invalid" | "host", "message",
"hint"}. The same files give the same image, whatever their order in the archive, their owners and
their times.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from templated.drivers.code import VIRTUAL_SIZE
from templated.drivers.code.entries import Entry, Kind, check_link, check_total, plan, refused
from templated.drivers.code.links import fault
from templated.errors import HostError, InvalidRequest, TemplatedError
from templated.model.function import MAX_CODE

_PIECE = 1 << 20
_MEMORY = 1 << 30
"""Bytes of address space for what reads the archive; mkfs.erofs, which reads only the files that
were made from it, may have `_MKFS_MEMORY`."""
_MKFS_MEMORY = 8 << 30
_CPU_SECONDS = 120
_MKFS = "mkfs.erofs"
_FORM = b"templated code 1\n"
"""The first that the files' digest is made of; another form of images is another digest."""
_BROKEN = (
    BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    ValueError,
    RuntimeError,
)
"""What zipfile raises for archives that are none; it says so in words for programmers."""


def main(arguments: list[str]) -> int:
    archive, folder, caller = arguments
    try:
        _confine(int(caller))
        record: dict[str, object] = make(Path(archive), Path(folder))
    except TemplatedError as error:
        kind = "invalid" if isinstance(error, InvalidRequest) else "host"
        record = {"error": kind, "message": error.message, "hint": error.hint}
    print(json.dumps(record), flush=True)
    return int("error" in record)


def make(archive: Path, folder: Path) -> dict[str, object]:
    """Make the image; InvalidRequest, HostError. Leaves what it wrote in `folder`."""
    tree, image = folder / "tree", folder / "image"
    try:
        tree.mkdir(mode=0o755)
        entries, contents, total = _unpack(archive, tree)
        identifier = _identify(entries, contents)
        _mkfs(image, tree, identifier)
        size, digest = _finish(image)
    except OSError as error:
        raise _host(error) from error
    return {"digest": digest, "uuid": identifier.hex, "bytes": total, "size": size}


def _confine(caller: int) -> None:
    """Bound this process and what it starts, and end with the caller."""
    os.umask(0o022)
    _end_with(caller)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (VIRTUAL_SIZE, VIRTUAL_SIZE))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))


def _end_with(parent: int) -> None:
    """prctl(2), PR_SET_PDEATHSIG; at once when the parent has ended before."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _host(error: OSError) -> HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostError("no space is left to make a code image", hint="free some in state_dir")
    return HostError(f"a code image cannot be made: {error}", hint="see the disk of state_dir")


# The archive


def _unpack(archive: Path, tree: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Write the files; returns the entries, and by path what each file or link holds, and bytes."""
    size = archive.stat().st_size
    if size > MAX_CODE:
        raise InvalidRequest(
            f"the archive has {size} bytes", hint=f"at most {MAX_CODE >> 20} MiB are taken"
        )
    try:
        with ZipFile(archive) as opened:
            entries = plan(opened.infolist(), size)
            return entries, *_Unpacking(opened, tree, size).run(entries)
    except MemoryError:
        raise InvalidRequest(
            "the archive takes too much memory to be read", hint="leave some files out"
        ) from None
    except _BROKEN as error:
        raise _broken(error) from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # it names a place before its beginning
            raise _broken(error) from error
        raise


def _broken(error: Exception) -> InvalidRequest:
    return InvalidRequest(
        f"the archive is broken: {error or type(error).__name__}",
        hint="it has to be a zip archive; make it again",
    )


class _Unpacking:
    """One archive on its way to a tree. No link is made before everything else is there."""

    def __init__(self, opened: ZipFile, tree: Path, size: int) -> None:
        self._opened = opened
        self._tree = tree
        self._size = size
        self._total = self._in_files = 0
        self._folders: set[str] = set()

    def run(self, entries: dict[str, Entry]) -> tuple[dict[str, str], int]:
        """Digests of files and targets of links by path, and the bytes of all files."""
        contents: dict[str, str] = {}
        links: dict[str, str] = {}
        for path, entry in sorted(entries.items()):
            if entry.kind is Kind.FOLDER:
                self._folder(path)
                continue
            self._folder(path.rpartition("/")[0])
            if entry.kind is Kind.LINK:
                links[path] = check_link(path, b"".join(self._content(entry)))
            else:
                contents[path] = self._file(entry)
        for path, target in links.items():
            if wrong := fault(path, links):
                raise refused(path, wrong)
            os.symlink(target, self._tree / path)
        return contents | links, self._in_files

    def _folder(self, path: str) -> None:
        if path and path not in self._folders:
            self._folder(path.rpartition("/")[0])
            os.mkdir(self._tree / path)
            self._folders.add(path)

    def _file(self, entry: Entry) -> str:
        digest = hashlib.sha256()
        with open(self._tree / entry.path, "xb") as out:
            for piece in self._content(entry):
                digest.update(piece)
                self._in_files += out.write(piece)
            os.fchmod(out.fileno(), 0o755 if entry.executable else 0o644)
        return digest.hexdigest()

    def _content(self, entry: Entry) -> Iterator[bytes]:
        with self._opened.open(entry.info) as content:
            while piece := content.read(_PIECE):
                self._total += len(piece)
                check_total(self._total, self._size)
                yield piece


def _identify(entries: dict[str, Entry], contents: dict[str, str]) -> uuid.UUID:
    """A UUID that follows from paths, types, modes and contents, and from nothing else."""
    whole: dict[str, tuple[str, int, str]] = {}
    for path, entry in entries.items():
        executable = int(entry.kind is Kind.FILE and entry.executable)
        whole[path] = (entry.kind.value, executable, contents.get(path, ""))
        above = path.rpartition("/")[0]
        while above and above not in whole:  # folders that no entry names are folders all the same
            whole[above] = (Kind.FOLDER.value, 0, "")
            above = above.rpartition("/")[0]
    # Paths hold no NUL.
    lines = [f"{path}\0{json.dumps(what)}\n".encode() for path, what in sorted(whole.items())]
    return uuid.UUID(bytes=hashlib.sha256(_FORM + b"".join(lines)).digest()[:16])


# The image


def _mkfs(image: Path, tree: Path, identifier: uuid.UUID) -> None:
    # -T0 sets all times, in 1.5 and in 1.8 (there it is --all-time, too); -x-1 leaves out
    # extended attributes.
    options = ("-T0", f"-U{identifier}", "--all-root", "-x-1", "--quiet")
    try:
        done = subprocess.run(
            (_MKFS, *options, str(image), str(tree)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            preexec_fn=functools.partial(_before_mkfs, os.getpid()),
        )
    except FileNotFoundError:
        raise HostError(f"{_MKFS} is not installed", hint="apt install erofs-utils") from None
    said = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    if done.returncode == -signal.SIGXFSZ or any(os.strerror(errno.EFBIG) in line for line in said):
        raise _too_big()
    if any(os.strerror(errno.ENOSPC) in line for line in said):
        raise _host(OSError(errno.ENOSPC, ""))
    if done.returncode != 0:
        raise HostError(
            f"{_MKFS} failed: {said[-1] if said else f'exit code {done.returncode}'}",
            hint="see whether state_dir has space and erofs-utils is whole",
        )


def _before_mkfs(parent: int) -> None:
    """In the new process. This one has a single thread, so that it may do anything."""
    _end_with(parent)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _MKFS_MEMORY if hard == resource.RLIM_INFINITY else min(hard, _MKFS_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _finish(image: Path) -> tuple[int, str]:
    """Give the image its size, its mode and a safe place on the disk; its bytes and digest."""
    with open(image, "r+b") as content:
        size = os.fstat(content.fileno()).st_size
        if size > VIRTUAL_SIZE:
            raise _too_big()
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        os.ftruncate(content.fileno(), VIRTUAL_SIZE)
        os.fchmod(content.fileno(), 0o444)
        os.fsync(content.fileno())
    return size, digest


def _too_big() -> InvalidRequest:
    return InvalidRequest(
        f"the files take more than {VIRTUAL_SIZE >> 20} MiB as an image",
        hint="each file takes some room beside its bytes; leave some out",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
