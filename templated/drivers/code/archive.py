"""A directory as an archive. A stand-in until the whole of it is merged."""

from __future__ import annotations

from pathlib import Path
from typing import IO
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo


def zip_directory(source: Path, target: IO[bytes]) -> None:
    """Write the files below `source` to `target` as a zip, the same for the same files."""
    with ZipFile(target, "w", ZIP_DEFLATED) as archive:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            info = ZipInfo(str(path.relative_to(source)))
            info.external_attr = path.stat().st_mode << 16
            archive.writestr(info, path.read_bytes())
