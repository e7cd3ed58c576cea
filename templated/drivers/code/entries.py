"""What a zip archive says is in it, checked before anything of it is written."""

from __future__ import annotations

import enum
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipInfo

from templated.errors import InvalidRequest
from templated.model.function import MAX_CODE

MOST_ENTRIES = 100_000
"""Files, folders and links of one archive."""
MOST_RATIO = 250
"""Bytes of files that one byte of the archive may become, past what `_SMALL` allows any."""
_SMALL = 16 << 20
_LONGEST_NAME = 255
_LONGEST_PATH = 1024
_LONGEST_LINK = 1024
_ENCRYPTED, _UTF8 = 0x1, 0x800
_UNIX = 3


class Kind(enum.Enum):
    """What an entry is; the value stands for it in the digest of the files."""

    FILE = "f"
    FOLDER = "d"
    LINK = "l"


@dataclass(frozen=True)
class Entry:
    """One file, folder or link, by its path in the code."""

    path: str
    kind: Kind
    executable: bool
    info: ZipInfo


def plan(infos: Iterable[ZipInfo], archive_bytes: int) -> dict[str, Entry]:
    """The entries of an archive of so many bytes, by path.

    Raises InvalidRequest for an entry that code cannot hold, or when they are too many or too big.
    """
    entries: dict[str, Entry] = {}
    total = 0
    for count, info in enumerate(infos, 1):
        if count > MOST_ENTRIES:
            raise InvalidRequest(
                f"the archive has more than {MOST_ENTRIES} entries", hint="leave some files out"
            )
        total += info.file_size
        check_total(total, archive_bytes)
        entry = _entry(info)
        if entry is not None:
            _enter(entries, entry)
    _check_parents(entries)
    return entries


def check_total(total: int, archive_bytes: int) -> None:
    """Raise InvalidRequest when an archive of so many bytes may not become `total` bytes."""
    if total > MAX_CODE:
        raise InvalidRequest(
            f"the files in the archive have more than {MAX_CODE >> 20} MiB",
            hint="leave some files out",
        )
    if total > max(_SMALL, MOST_RATIO * archive_bytes):
        raise InvalidRequest(
            f"the archive's {archive_bytes} bytes become more than {MOST_RATIO} times as many",
            hint="code is not made from archives like that; leave out files that hold nothing",
        )


def check_link(path: str, target: bytes) -> str:
    """The target of a link; InvalidRequest when no link can have it."""
    try:
        text = target.decode()
    except UnicodeDecodeError:
        raise refused(path, "is a link whose target is not UTF-8") from None
    if not 0 < len(target) <= _LONGEST_LINK or "\0" in text:
        raise refused(path, "is a link with a target that no link can have")
    return text


def refused(path: str, wrong: str) -> InvalidRequest:
    """The error for one entry."""
    return InvalidRequest(
        f"{path[:200]!r} in the archive {wrong}", hint="make the archive again without it"
    )


def _entry(info: ZipInfo) -> Entry | None:
    """None for the top itself."""
    name = _name(info)
    path = _path(name)
    mode = info.external_attr >> 16 if info.create_system == _UNIX else 0
    kind = _kind(name, mode)
    if info.flag_bits & _ENCRYPTED:
        raise refused(name, "is encrypted")
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise refused(name, f"is compressed in a way (method {info.compress_type}) that is unusual")
    if kind is Kind.FOLDER and info.file_size:
        raise refused(name, "is a folder that has content")
    if kind is Kind.LINK and info.file_size > _LONGEST_LINK:
        raise refused(name, "is a link with a target that no link can have")
    if path:
        return Entry(path, kind, bool(mode & 0o111), info)
    if kind is not Kind.FOLDER:
        raise refused(name, "has no name")
    return None


def _name(info: ZipInfo) -> str:
    """As it is in the archive: `filename` ends at the first NUL."""
    name = info.orig_filename
    if info.flag_bits & _UTF8 or name.isascii():
        return name
    # Many programs write UTF-8 without saying so.
    try:
        return name.encode("cp437").decode()
    except ValueError:
        return name


def _path(name: str) -> str:
    """The path in the code; "" for the top."""
    if "\0" in name:
        raise refused(name, "has a name with a NUL")
    if "\\" in name:
        raise refused(name, "has a name with a backslash")
    if name.startswith("/"):
        raise refused(name, "has an absolute name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise refused(name, "leads out of the archive")
    path = "/".join(parts)
    try:
        longest = max((len(part.encode()) for part in parts), default=0)
        if longest > _LONGEST_NAME or len(path.encode()) > _LONGEST_PATH:
            raise refused(name, "has a name that is too long")
    except UnicodeEncodeError:
        raise refused(name, "has a name that is not UTF-8") from None
    return path


def _kind(name: str, mode: int) -> Kind:
    form = stat.S_IFMT(mode)
    if name.endswith("/"):
        if form in (0, stat.S_IFDIR):
            return Kind.FOLDER
        raise refused(name, "is a folder by its name and something else by its type")
    kinds = {0: Kind.FILE, stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.FOLDER}
    kinds[stat.S_IFLNK] = Kind.LINK
    if form not in kinds:
        raise refused(name, "is neither a file, a folder nor a link")
    return kinds[form]


def _enter(entries: dict[str, Entry], entry: Entry) -> None:
    other = entries.setdefault(entry.path, entry)
    # A folder may be named as often as an archiver likes: it holds nothing itself.
    if other is not entry and not other.kind is entry.kind is Kind.FOLDER:
        raise refused(entry.path, "is there twice")


def _check_parents(entries: dict[str, Entry]) -> None:
    """Whatever has something below it is a folder."""
    for path in entries:
        above = path.rpartition("/")[0]
        while above:
            parent = entries.get(above)
            if parent is not None and parent.kind is not Kind.FOLDER:
                raise refused(above, "is a file or a link, and a folder too")
            above = above.rpartition("/")[0]
