"""The code of functions: read-only file-system images, addressed by what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VIRTUAL_SIZE = 512 << 20
"""Bytes that every image has for the guest, whatever is in it: a guest keeps the size that it
booted with. The file is sparse."""


@dataclass(frozen=True)
class CodeFile:
    """A complete image on this node whose content was verified."""

    digest: str
    """SHA-256 of the image without the hole at its end, in hex."""
    path: Path
    uuid: str
    """The file system's, 32 hex digits, made from the files: the guest proves by it what it has
    mounted."""
