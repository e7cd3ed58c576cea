"""Names that people give: clones become host names, so they follow RFC 1123 in lower case."""

from __future__ import annotations

import re

from templated.errors import InvalidRequest

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MAX_COUNT = 1000


def check_clone_name(name: str) -> str:
    """Return `name`, or raise InvalidRequest that says which rule it breaks."""
    if _LABEL.fullmatch(name):
        return name
    raise InvalidRequest(f"{_shown(name)} is not a clone name: {_broken_rule(name)}", hint=_HINT)


_HINT = "a name is a host name: 1 to 63 of a-z, 0-9 and '-', as in fn-123"


def _shown(name: str) -> str:
    return repr(name if len(name) <= 70 else name[:60] + "...")


def _broken_rule(name: str) -> str:
    if not name:
        return "it is empty"
    if len(name) > 63:
        return f"it has {len(name)} characters, a host name at most 63"
    if name != name.lower() and name.isalnum():
        return "it has upper case letters"
    if name.startswith("-") or name.endswith("-"):
        return "it begins or ends with '-'"
    bad = sorted({c for c in name if not re.fullmatch("[a-z0-9-]", c)})
    return "it contains " + ", ".join(repr(c) for c in bad[:5])


def numbered(name: str, count: int | None) -> list[str]:
    """The names that a request for `count` clones makes: NAME itself, or NAME-1 to NAME-count."""
    if count is None:
        return [check_clone_name(name)]
    if not 1 <= count <= MAX_COUNT:
        raise InvalidRequest(
            f"cannot make {count} clones",
            hint=f"--count takes a number from 1 to {MAX_COUNT}",
        )
    check_clone_name(name)
    return [check_clone_name(f"{name}-{i}") for i in range(1, count + 1)]
