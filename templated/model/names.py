"""Names that people give. Clones become host names, so they follow RFC 1123 in lower case;
functions, versions and aliases are named as in AWS Lambda."""

from __future__ import annotations

import re

from templated.errors import InvalidRequest

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MAX_COUNT = 1000
LATEST = "$LATEST"
"""The version of a function that still changes."""
FUNCTION_NAME = r"[A-Za-z0-9_-]{1,64}"
ALIAS_NAME = r"(?![0-9]+$)[A-Za-z0-9_-]{1,128}"
_QUALIFIER = re.compile(rf"\$LATEST|[1-9][0-9]{{0,8}}|{ALIAS_NAME}")


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


def check_qualifier(qualifier: str) -> str:
    """Return `qualifier`, or raise InvalidRequest: it names a version or an alias."""
    if _QUALIFIER.fullmatch(qualifier):
        return qualifier
    raise InvalidRequest(
        f"{qualifier[:140]!r} is neither a version nor an alias",
        hint=f"take a number, {LATEST}, or an alias of up to 128 of A-Z, a-z, 0-9, '-' and '_'",
    )


def check_function_name(name: str) -> str:
    """Return `name`, or raise InvalidRequest."""
    if re.fullmatch(FUNCTION_NAME, name):
        return name
    raise InvalidRequest(
        f"{name[:70]!r} is not a function name",
        hint="a name has 1 to 64 of A-Z, a-z, 0-9, '-' and '_'",
    )
