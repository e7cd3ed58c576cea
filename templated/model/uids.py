"""The users that VMs run as: numbers that nobody else has."""

from __future__ import annotations

import hashlib
from typing import Annotated

from msgspec import Meta, Struct

# Numbers that no distribution and no container manager gives away: systemd's containers end
# before, and from 2^31 on some programs take them for negative (systemd's UIDS-GIDS document).
_FIRST, _END = 1879048192, 2147483648
_BLOCK = 65536
_Uid = Annotated[int, Meta(ge=1, lt=2**32 - 1)]


class UidRange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers of users and groups, one of each for each VM."""

    first: _Uid
    count: Annotated[int, Meta(ge=1, le=_BLOCK)]

    def __post_init__(self) -> None:
        if self.first + self.count >= 2**32:
            raise ValueError("first and count lead beyond the last uid")

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.count
        return self.first + index

    def __contains__(self, uid: object) -> bool:
        return isinstance(uid, int) and self.first <= uid < self.first + self.count

    def __str__(self) -> str:
        return f"{self.first} to {self.first + self.count - 1}"

    def meets(self, first: int, count: int) -> bool:
        """Whether it has numbers in common with another range."""
        return first < self.first + self.count and self.first < first + count


def block_of(tag: bytes) -> UidRange:
    """The numbers of one daemon by default: another daemon of this host has others."""
    blocks = (_END - _FIRST) // _BLOCK
    number = int.from_bytes(hashlib.sha256(b"uids" + tag).digest()[:8], "big") % blocks
    return UidRange(first=_FIRST + number * _BLOCK, count=_BLOCK)
