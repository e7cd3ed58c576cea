"""What is wrong with a field, in words: msgspec itself would show a pattern."""

from __future__ import annotations

import re
from typing import Any, get_args

import msgspec

from templated.model.function import (
    LONGEST,
    AliasName,
    Digest,
    EnvName,
    FunctionName,
    Handler,
)
from templated.model.spec import TemplateName
from templated.model.units import Duration, Size

_WRONG = re.compile(r"Expected `str` matching regex (?P<pattern>.+) - at (?P<place>.+)", re.DOTALL)
_NAME = "of A-Z, a-z, 0-9, '-' and '_'"


def _pattern(kind: Any) -> str:
    """As msgspec shows it."""
    return repr(get_args(kind)[1].pattern)


_RULES = {
    _pattern(Duration): ("a time", "as 30s, 2m or 250ms"),
    _pattern(Size): ("a size", "as 64MiB or 2GiB"),
    _pattern(EnvName): (
        "the name of a variable",
        "a letter, then up to 127 of A-Z, a-z, 0-9 and '_'",
    ),
    _pattern(Handler): ("a handler", "as app.handler: 1 to 128 characters and no space"),
    _pattern(FunctionName): ("the name of a function", f"1 to 64 {_NAME}"),
    _pattern(AliasName): ("the name of an alias", f"1 to 128 {_NAME}, and not digits alone"),
    _pattern(Digest): ("a digest of code", "64 digits of 0-9 and a-f"),
    _pattern(TemplateName): (
        "the name of a template",
        "1 to 49 of a-z, 0-9 and '-', with no '-' at either end",
    ),
}


def explained(error: msgspec.ValidationError) -> tuple[str, str]:
    """What is wrong, in one line that names the field, and how it should be; the latter is empty
    where the first says it."""
    found = _WRONG.fullmatch(str(error))
    if found is None or found["pattern"] not in _RULES:
        return str(error), ""
    kind, rule = _RULES[found["pattern"]]
    if found["place"] == "`$.timeout`":
        rule += f", at most {LONGEST:g}s"
    return f"{_field(found['place'])} is not {kind}", rule


def _field(place: str) -> str:
    """`env` of "`key` in `$.env`" as "a key of env"."""
    path = re.sub(r"^\$\.?|`", "", place.rpartition(" in ")[2].strip("`")) or "it"
    return f"a key of {path}" if place.startswith("`key`") else path
