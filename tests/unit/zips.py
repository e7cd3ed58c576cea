"""Zip archives for tests: as they are, and as they must not be."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterable
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

FILE, LINK, FOLDER = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755

Item = tuple[str, bytes, int]
"""Name, content, and mode with the type."""


def zipped(
    items: Iterable[Item], *, date: tuple[int, int, int, int, int, int] | None = None
) -> bytes:
    """An archive of these entries, in this order."""
    out = io.BytesIO()
    with ZipFile(out, "w", ZIP_DEFLATED) as archive:
        for name, content, mode in items:
            entry = ZipInfo("x", date or (2001, 2, 3, 4, 5, 6))
            # Past what the class does to names.
            entry.filename = entry.orig_filename = name
            entry.create_system = 3
            entry.external_attr = mode << 16
            entry.compress_type = ZIP_DEFLATED
            archive.writestr(entry, content)
            archive.NameToInfo.clear()  # it would warn of a name that comes again
    return out.getvalue()


def files(contents: dict[str, bytes]) -> bytes:
    """An archive of plain files."""
    return zipped((name, content, FILE) for name, content in contents.items())
