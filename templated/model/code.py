"""The code of functions as users see it: what is on this node."""

from __future__ import annotations

import enum

from msgspec import Struct

from templated.model.function import Digest


class CodeRow(Struct, frozen=True, kw_only=True):
    """One code image on this node."""

    digest: Digest
    bytes: int
    """Of the files in it."""
    size: int
    """Bytes that it takes here."""
    used: str
    """When it was used last; RFC 3339, UTC."""
    needed: bool
    """Whether a version or `$LATEST` of a function has it: then it stays."""
    verified: bool
    """Whether its content was verified since the daemon started; otherwise it is before its use."""


class CodeState(enum.StrEnum):
    """What a check of a code image found."""

    OK = "ok"
    REPAIRED = "repaired"
    """It was damaged, and fetched from the zone again."""
    DAMAGED = "damaged"
    """It was damaged, and is gone from this node."""


class CodeCheck(Struct, frozen=True, kw_only=True):
    """What the check of one code image found."""

    digest: Digest
    state: CodeState
    problem: str = ""
    """Why it is not on this node any more."""


class CodeFreed(Struct, frozen=True, kw_only=True):
    """What was removed because nothing needs it."""

    removed: tuple[Digest, ...]
    size: int
    """Bytes that it took."""
