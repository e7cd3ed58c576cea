"""What a deploy and an alias ask for, checked: what is kept can be read again, and can work."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import msgspec

from templated.errors import InvalidRequest, NotFound
from templated.model.function import LATEST, Alias, DeployRequest, Runtime, Settings, Told
from templated.model.mistakes import explained

T = TypeVar("T")
_BOOTSTRAP = "bootstrap"
_PYTHON = re.compile(r"[^.]+(\.[^.]+)*\.[A-Za-z_]\w*")
# Floating point: 0.7 and 0.3 add up to one.
_TOLERANCE = 1e-9


def merged(wanted: DeployRequest, old: Settings | None, takers: Sequence[str]) -> Settings:
    """The settings that a deploy asks for: what it leaves out is that of `old`, or a default.

    Raises InvalidRequest, or NotFound when no template takes code.
    """
    runtime = wanted.runtime or (old.runtime if old else Runtime.PYTHON)
    given = {
        "handler": wanted.handler or _default_handler(runtime, old),
        "template": _template(wanted.template, old, takers),
        "runtime": runtime,
        "env": wanted.env,
        "timeout": wanted.timeout,
        "description": wanted.description,
        "told": _told(wanted.told, old.told if old else Told()),
    }
    before = msgspec.structs.asdict(old) if old else {}
    settings = strict({**before, **_given(given)}, Settings)
    if runtime is Runtime.PYTHON and not _PYTHON.fullmatch(settings.handler):
        raise InvalidRequest(
            f"the handler {settings.handler!r} is not MODULE.FUNCTION", hint="as in app.handler"
        )
    return settings


def _told(wanted: Told | None, old: Told) -> Told:
    """What is empty stays."""
    said = msgspec.structs.asdict(wanted or Told())
    return msgspec.structs.replace(old, **{name: text for name, text in said.items() if text})


def _given(values: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


def _default_handler(runtime: Runtime, old: Settings | None) -> str:
    if old is not None:
        return old.handler
    if runtime is Runtime.PROVIDED:
        return _BOOTSTRAP
    raise InvalidRequest("a new function needs a handler", hint="as in app.handler")


def _template(wanted: str | None, old: Settings | None, takers: Sequence[str]) -> str:
    if wanted is None and old is not None:
        return old.template
    known = ", ".join(takers)
    if not takers:
        raise NotFound(
            "no template that serves takes code",
            hint="set `code: true` in a template and build it: templated template build NAME",
        )
    if wanted is None:
        if len(takers) > 1:
            raise InvalidRequest(f"several templates take code: {known}", hint="choose one")
        return takers[0]
    if wanted not in takers and (old is None or wanted != old.template):
        raise InvalidRequest(
            f"the template {wanted[:70]!r} does not serve, or takes no code",
            hint=f"templates that do: {known}",
        )
    return wanted


def strict(fields: object, kind: type[T]) -> T:
    """`fields` as what they must be. InvalidRequest otherwise: the journal would refuse them."""
    try:
        made = msgspec.convert(msgspec.to_builtins(fields), kind)
        msgspec.json.encode(made)
    except msgspec.ValidationError as error:
        message, rule = explained(error)
        raise InvalidRequest(message, hint=rule) from None
    except UnicodeEncodeError:
        raise InvalidRequest("a text has half of a character in it") from None
    return made


def pointed(
    function: str,
    name: str,
    versions: Mapping[str, float],
    description: str,
    known: Collection[str],
) -> Alias:
    """An alias for `versions`, by weight, of which each must be `known`. Raises InvalidRequest, or
    NotFound for a version that is not there."""
    alias = strict(
        {"function": function, "name": name, "versions": versions, "description": description},
        Alias,
    )
    if not 1 <= len(alias.versions) <= 2:
        raise InvalidRequest(
            f"an alias points at one version or at two, not at {len(alias.versions)}",
            hint="as in: 3=0.9 4=0.1",
        )
    if missing := [label for label in alias.versions if label not in known]:
        raise NotFound(
            f"function {function} has no version {missing[0][:70]}", hint=f"it has: {listed(known)}"
        )
    if len(alias.versions) == 2 and LATEST in alias.versions:
        raise InvalidRequest(
            f"an alias with weights cannot point at {LATEST}", hint="publish a version first"
        )
    total = sum(alias.versions.values())
    if abs(total - 1) > _TOLERANCE:
        raise InvalidRequest(f"the weights add up to {total:g}, not to 1", hint="as in 0.9 and 0.1")
    return alias


def listed(names: Collection[str], most: int = 10) -> str:
    """The first names for a hint."""
    shown = list(names)
    rest = f", and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) + rest) or "none"
