"""The files of the node's code cache: found, placed, checked, removed. All of it blocks."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from templated.drivers.code import CodeFile
from templated.drivers.code.image import Record, is_whole, read_record, write_record
from templated.drivers.host.files import Stamp, fsync, remove_directory, stamp
from templated.errors import HostError

log = logging.getLogger(__name__)
_IMAGE, _RECORD = ".img", ".json"
_PLACEHOLDER = "placeholder"
_WORK = ".pack-"


@dataclass(eq=False)
class Entry:
    """One image on this node."""

    record: Record
    path: Path
    used: float
    """Seconds since 1970."""
    stamp: Stamp | None = None
    """Of the file whose content was verified; None: not since the daemon started."""

    @property
    def current(self) -> bool:
        """Whether what was verified is what is there. Costs one stat."""
        return self.stamp is not None and self.stamp == stamp(self.path)

    @property
    def file(self) -> CodeFile:
        return self.record.file(self.path)

    def verify(self) -> bool:
        """Read all of it, and remember that it is what its digest says."""
        before = stamp(self.path)
        try:
            whole = before is not None and is_whole(self.path, self.record)
        except OSError as error:
            log.warning("cannot read %s: %s", self.path, error.strerror)
            whole = False
        self.stamp = before if whole else None
        return whole

    def touch(self, when: float) -> None:
        """Remember the time of its use, also for after a restart."""
        self.used = when
        try:
            os.utime(self.path.with_suffix(_RECORD), (when, when))
        except OSError as error:  # it is evicted too early at worst
            log.debug("cannot set the time of %s: %s", self.path, error.strerror)


class Shelf:
    """The folder with the images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scan(self) -> dict[str, Entry]:
        """What is there, by digest; what is only half there is removed. Raises HostError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = [path.name for path in self.folder.iterdir()]
            for name in names:
                if name.startswith("."):
                    remove_directory(self.folder / name)
                elif name.endswith(".part"):
                    (self.folder / name).unlink()
        except OSError as error:
            raise self._refused(error) from error
        stems = {Path(name).stem for name in names if name.endswith((_IMAGE, _RECORD))}
        found = {stem: self._find(stem) for stem in stems - {_PLACEHOLDER}}
        return {digest: entry for digest, entry in found.items() if entry is not None}

    def _find(self, digest: str) -> Entry | None:
        image, path = self._paths(digest)
        record = read_record(path)
        if record is None or record.digest != digest or not image.is_file():
            log.warning("removing what is left of code %s", digest)
            self.remove(digest)
            return None
        return Entry(record, image, path.stat().st_mtime)

    def place(self, record: Record, image: Path, when: float) -> Entry:
        """Give a verified image its name, durably. Raises HostError; leaves no part of it then."""
        target, path = self._paths(record.digest)
        try:
            write_record(path, record)
            image.rename(target)
            fsync(self.folder)
        except OSError as error:
            self.remove(record.digest)
            raise self._refused(error) from error
        entry = Entry(record, target, when, stamp(target))
        entry.touch(when)
        return entry

    def remove(self, digest: str) -> bool:
        """Remove an image; whether it is gone. VMs that have it open keep it."""
        try:
            for path in self._paths(digest):
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot remove code %s: %s", digest, error)
            return False
        return True

    def work(self) -> Path:
        """A new folder for an image on its way. Raises HostError."""
        try:
            return Path(tempfile.mkdtemp(prefix=_WORK, dir=self.folder))
        except OSError as error:
            raise self._refused(error) from error

    def _paths(self, digest: str) -> tuple[Path, Path]:
        return self.folder / (digest + _IMAGE), self.folder / (digest + _RECORD)

    def _refused(self, error: OSError) -> HostError:
        return HostError(
            f"code cannot be kept in {self.folder}: {error.strerror or error}",
            hint="see whether state_dir has space",
        )
