"""What scaling has learned, in one file: written whole and renamed, checked when it is read.

A first line with what it is and the SHA-256 of the rest, then a line of JSON for each part.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

MOST = 64 << 20
"""Bytes of a file; 2 to 30 KB are a function's version."""
_MAGIC = b"templated-scaling 1 "


def read(path: Path) -> list[Any]:
    """The parts in it; none when there is no file. ValueError for one that is damaged or too big,
    OSError for one that cannot be read."""
    try:
        if path.stat().st_size > MOST + 1024:
            raise ValueError("it is too big")
        head, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return []
    if head != _head(body):
        raise ValueError("it is damaged, or of another version")
    return [msgspec.json.decode(line) for line in body.splitlines()]


def write(path: Path, parts: Iterable[bytes]) -> int:
    """Write parts of JSON, the first ones first, as many as there is room for; returns how many
    were left out. OSError when it cannot be; leaves the file that was then."""
    lines, size, left_out = [], 0, 0
    for part in parts:
        if size + len(part) < MOST:
            lines.append(part + b"\n")
            size += len(part) + 1
        else:
            left_out += 1
    body = b"".join(lines)
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        file.write(_head(body) + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return left_out


def _head(body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(body).hexdigest().encode()
