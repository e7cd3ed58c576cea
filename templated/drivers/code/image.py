"""Code images on this node: made from archives, described, and checked against their digests.

<digest>.img     the image, read-only, VIRTUAL_SIZE bytes of which the first `size` count
<digest>.json    its Record
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal
from zipfile import ZipFile, ZipInfo

import msgspec
from msgspec import Meta, Struct

import templated
from templated.drivers.code import VIRTUAL_SIZE, CodeFile
from templated.drivers.host.files import fsync, remove_directory
from templated.drivers.host.programs import started
from templated.errors import HostError, InvalidRequest
from templated.model.function import Digest

PACK_SECONDS = 180.0
_PIECE = 1 << 20
_UUID_AT = 1072
"""Where erofs has its UUID: the superblock is at 1024."""
_REHEARSAL = '''"""What a rehearsal runs: it gives back what it is given."""


def handler(event, context):
    return event
'''


class Record(Struct, frozen=True, kw_only=True):
    """What is known of an image."""

    digest: Digest
    uuid: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]
    bytes: Annotated[int, Meta(ge=0)]
    """Of all files in it."""
    size: Annotated[int, Meta(gt=_UUID_AT, le=VIRTUAL_SIZE)]
    """Bytes of the image before the hole at its end."""

    def file(self, path: Path) -> CodeFile:
        """The image at `path`, whose content was verified."""
        return CodeFile(digest=self.digest, path=path, uuid=self.uuid)


class _Refusal(Struct, frozen=True, kw_only=True):
    error: Literal["invalid", "host"]
    message: str
    hint: str


async def make_image(archive: Path, folder: Path) -> tuple[Record, Path]:
    """Make an image from a zip archive in `folder`, which is empty and the caller's to remove.

    In a process of its own, for a bounded time. Raises InvalidRequest for an archive that is no
    code, HostError when this host cannot make it; leaves parts in `folder`.
    """
    command = (sys.executable, "-P", "-m", "templated.drivers.code.pack")
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        # The same modules as here, wherever they were found.
        "PYTHONPATH": str(Path(templated.__file__).parents[1]),
        "PYTHONUTF8": "1",
    }
    try:
        async with (
            asyncio.timeout(PACK_SECONDS),
            started(
                *(*command, str(archive), str(folder), str(os.getpid())),
                stderr=asyncio.subprocess.PIPE,
                env=environment,
            ) as process,
        ):
            out, err = await process.communicate()
    except TimeoutError:
        raise HostError(
            f"the code image was not made within {PACK_SECONDS:g} s",
            hint="see how loaded the host and its disk are",
        ) from None
    try:
        if process.returncode == 0:
            return msgspec.json.decode(out, type=Record), folder / "image"
        refusal = msgspec.json.decode(out, type=_Refusal)
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise _ended(process.returncode, err) from None
    kind = InvalidRequest if refusal.error == "invalid" else HostError
    raise kind(refusal.message, hint=refusal.hint)


def _ended(code: int | None, err: bytes) -> HostError | InvalidRequest:
    """The process was ended by a bound, or by the host."""
    lines = err.decode(errors="replace").strip().splitlines()
    if lines and lines[-1].startswith("MemoryError"):
        return InvalidRequest(
            "the archive takes too much memory to be read", hint="leave some files out"
        )
    said = lines[-1] if lines else f"exit code {code}"
    return HostError(f"making a code image failed: {said}", hint="see the daemon's log, try again")


# Files on this node


def read_record(path: Path) -> Record | None:
    """The record in a file; None when there is none that is whole. Blocks."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None


def write_record(path: Path, record: Record) -> None:
    """Write a record durably, whole or not at all. Blocks; raises OSError."""
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(msgspec.json.encode(record) + b"\n")
        fsync(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def is_whole(path: Path, record: Record) -> bool:
    """Whether the image at `path` is what its record says. Reads all of it; raises OSError."""
    with open(path, "rb", buffering=0) as content:
        if os.fstat(content.fileno()).st_size != VIRTUAL_SIZE:
            return False
        digest, left = hashlib.sha256(), record.size
        while left and (piece := content.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
        if left or digest.hexdigest() != record.digest:
            return False
        return uuid_of(content.fileno()) == record.uuid and _is_hole(content.fileno(), record.size)


def uuid_of(descriptor: int) -> str:
    """The UUID of an image's file system, 32 hex digits. Blocks; raises OSError."""
    return os.pread(descriptor, 16, _UUID_AT).hex()


def _is_hole(descriptor: int, begin: int) -> bool:
    """Whether nothing was written behind the image."""
    while begin < VIRTUAL_SIZE:
        try:
            begin = os.lseek(descriptor, begin, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole follows
            return True
        # A file system may keep more of the last block than was written.
        piece = os.pread(descriptor, _PIECE, begin)
        if piece.count(0) != len(piece):
            return False
        begin += len(piece) or VIRTUAL_SIZE
    return True


async def placeholder(folder: Path) -> CodeFile:
    """The image of a VM without a function, `folder`/placeholder.img: what a rehearsal runs.

    Made once; the same on each host that has the same erofs-utils. Raises HostError; leaves what
    was there.
    """
    return await asyncio.to_thread(_found, folder) or await _make_placeholder(folder)


def _found(folder: Path) -> CodeFile | None:
    path = folder / "placeholder.img"
    record = read_record(folder / "placeholder.json")
    try:
        return record.file(path) if record is not None and is_whole(path, record) else None
    except OSError:
        return None


async def _make_placeholder(folder: Path) -> CodeFile:
    try:
        work = await asyncio.to_thread(_work_folder, folder)
        try:
            archive = work / "archive.zip"
            await asyncio.to_thread(archive.write_bytes, _rehearsal())
            made = work / "made"
            await asyncio.to_thread(made.mkdir)
            record, image = await make_image(archive, made)
            return await asyncio.to_thread(_publish, folder, record, image)
        finally:
            await asyncio.to_thread(remove_directory, work)
    except OSError as error:
        raise HostError(
            f"the placeholder for code cannot be made in {folder}: {error.strerror}",
            hint="see whether state_dir has space",
        ) from error


def _work_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".pack-", dir=folder))


def _publish(folder: Path, record: Record, image: Path) -> CodeFile:
    path = folder / "placeholder.img"
    image.rename(path)
    write_record(folder / "placeholder.json", record)
    fsync(folder)
    return record.file(path)


def _rehearsal() -> bytes:
    out = io.BytesIO()
    with ZipFile(out, "w") as archive:
        archive.writestr(ZipInfo("templated_rehearsal.py"), _REHEARSAL)
    return out.getvalue()
