"""Symbolic links within a function's code: where they lead, without asking a file system."""

from __future__ import annotations

from collections.abc import Mapping

_MOST_HOPS = 40
"""As in the kernel: path_resolution(7)."""


def fault(link: str, links: Mapping[str, str]) -> str:
    """What is wrong with `link`, a key of `links` (path to target); "" when it is right.

    A link is right that stays within the tree, also when what it names is not there. All links on
    the way are followed: `a/..` leaves the tree where `a` leads to its top.
    """
    hops = 0
    here = link.split("/")
    pending: list[str] = []
    while True:
        target = links.get("/".join(here)) if here else None
        if target is not None:
            hops += 1
            if hops > _MOST_HOPS:
                return "is a link that leads in a circle"
            if target.startswith("/"):
                return "is a link with an absolute target"
            here.pop()
            pending.extend(reversed(target.split("/")))
        if not pending:
            return ""
        part = pending.pop()
        if part == "..":
            if not here:
                return "is a link that leads out of the code"
            here.pop()
        elif part not in ("", "."):
            here.append(part)
