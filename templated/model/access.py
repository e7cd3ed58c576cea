"""Who may call what: roles, rights that reach into guests, and the rules that give them."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass


class Role(enum.StrEnum):
    """What a caller is to the daemon; each role may do all that those before it may."""

    VIEWER = "viewer"
    """Looks: all that is listed and shown, events, metrics."""
    OPERATOR = "operator"
    """Starts and removes clones, reads their consoles, sets the sizes of pools."""
    ADMIN = "admin"
    """Does everything: builds and removes templates, too, and reads the audit log."""


class Right(enum.StrEnum):
    """What reaches into a guest, and is given apart from the roles."""

    EXEC = "exec"
    """Run commands in clones."""
    COPY = "copy"
    """Read and write files of clones."""


Need = Role | Right

_RANKS = {role: rank for rank, role in enumerate(Role)}
# Whoever runs commands in a guest can read and write its files: to withhold `copy` from those
# who have `exec` by default would be no protection.
_RIGHTS = {
    Role.VIEWER: frozenset[Right](),
    Role.OPERATOR: frozenset(Right),
    Role.ADMIN: frozenset(Right),
}


@dataclass(frozen=True)
class Grant:
    """What somebody may do: a role, or none, and rights."""

    role: Role | None
    rights: frozenset[Right]

    def allows(self, need: Need) -> bool:
        """Whether this is enough for what needs `need`."""
        if isinstance(need, Right):
            return need in self.rights
        return self.role is not None and _RANKS[self.role] >= _RANKS[need]

    def __str__(self) -> str:
        if self.role is None:
            return "no role"
        rights = " and ".join(right for right in Right if right in self.rights)
        return f"the role {self.role}, {f'with {rights}' if rights else 'without exec and copy'}"


EVERYTHING = Grant(Role.ADMIN, frozenset(Right))
NOTHING = Grant(None, frozenset())


def grant(role: Role, rights: Iterable[Right] | None) -> Grant:
    """What a rule gives: its role, and `rights` in place of those that the role brings."""
    return Grant(role, _RIGHTS[role] if rights is None else frozenset(rights))


@dataclass(frozen=True)
class Rule:
    """Gives `grant` to a uid, or to all who are in a group; the other one is None."""

    grant: Grant
    uid: int | None = None
    gid: int | None = None

    def matches(self, uid: int, gids: Collection[int]) -> bool:
        """Whether the rule speaks of this caller."""
        return self.uid == uid if self.gid is None else self.gid in gids


def granted(rules: Iterable[Rule], uid: int, gids: Collection[int]) -> Grant:
    """The highest role and all rights of the rules that match; NOTHING when none does."""
    found = [rule.grant for rule in rules if rule.matches(uid, gids)]
    if not found:
        return NOTHING
    highest = max((one.role for one in found if one.role), key=_RANKS.__getitem__)
    return Grant(highest, frozenset().union(*(one.rights for one in found)))


def describe(need: Need) -> str:
    """`need` for a sentence, such as "the role operator"."""
    return f"the {'right' if isinstance(need, Right) else 'role'} {need}"
