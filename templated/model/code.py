"""The code of functions as users see it: what is on this node."""

from __future__ import annotations

import enum
import re

from msgspec import Struct

from templated.errors import InvalidRequest
from templated.model.function import Digest

_DIGEST = re.compile("[0-9a-f]{64}")


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


def check_digest(digest: str) -> str:
    """Return `digest`, or raise InvalidRequest: it is that of a code image."""
    if _DIGEST.fullmatch(digest):
        return digest
    raise InvalidRequest(
        f"{digest[:70]!r} is not the digest of code",
        hint="it has 64 digits of 0-9 and a-f; see: templated function show NAME -o json",
    )
