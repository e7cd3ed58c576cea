"""All that is known of one function, and whether its rows fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from templated.errors import HostError, InvalidRequest, NotFound
from templated.journal import FunctionRow, now
from templated.model.function import LATEST, Alias, CodeView, Provisioned, Settings, Version
from templated.services.functions.settings import pointed

_SHOWN = 70
# Of a share of instances: 0.1 of 10 is one, whatever floating point makes of it.
_DIGITS = 6


@dataclass
class Record:
    """One function; number 0 is `$LATEST`."""

    row: FunctionRow
    versions: dict[int, Version] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    provisioned: dict[str, Provisioned] = field(default_factory=dict)
    """By version or alias."""
    held: dict[str, Alias] = field(default_factory=dict)
    """Where requests go still, for an alias that points elsewhere by now."""

    @property
    def latest(self) -> Version:
        """`$LATEST`."""
        return self.versions[0]

    def numbered(self) -> list[Version]:
        """The numbered versions, newest first."""
        return [self.versions[number] for number in sorted(self.versions, reverse=True) if number]

    def labels(self) -> list[str]:
        """Of all versions."""
        return [LATEST, *(version.label for version in self.numbered())]

    def find(self, label: str) -> Version | None:
        """The version of a label."""
        if label == LATEST:
            return self.latest
        return self.versions.get(int(label)) if label.isdecimal() else None

    def shares(self, qualifier: str, count: int) -> dict[str, int]:
        """So many instances for a version or an alias, by the label of the version."""
        alias = self.aliases.get(qualifier)
        return shared(alias.versions if alias else {qualifier: 1.0}, count)

    def kept(self, label: str) -> int:
        """How many instances of a version are to be ready."""
        least = self.row.least if label == LATEST else 0
        shares = (self.shares(q, p.count).get(label, 0) for q, p in self.provisioned.items())
        return least + sum(shares)

    @property
    def kept_in_all(self) -> int:
        """How many instances users have asked to keep."""
        return self.row.least + sum(one.count for one in self.provisioned.values())


def shared(weights: Mapping[str, float], count: float) -> dict[str, int]:
    """`count` instances by the weights of versions, each rounded up."""
    return {label: math.ceil(round(weight * count, _DIGITS)) for label, weight in weights.items()}


def latest_of(name: str, settings: Settings, code: CodeView) -> Version:
    """`$LATEST` of a function, changed now."""
    return Version(function=name, number=0, settings=settings, code=code, created=now())


def details(version: Version) -> dict[str, object]:
    """What an event says of a version."""
    code = version.code
    return {
        "version": version.label,
        "template": version.settings.template,
        "digest": code.digest,
        "bytes": code.bytes,
    }


def same(one: Version, other: Version) -> bool:
    """Whether a number need not be spent: the description alone makes no other version."""
    plain = [replace(version.settings, description="") for version in (one, other)]
    return plain[0] == plain[1] and one.code == other.code


def owner(found: dict[str, Record], name: str) -> Record:
    """The function of a row. Raises HostError when there is none."""
    if name in found:
        return found[name]
    raise _unfit(name, "it has versions, aliases or provisioned instances, and is not there")


def check_fit(name: str, function: Record) -> None:
    """Raise HostError when the rows of a function do not fit together."""
    if 0 not in function.versions:
        raise _unfit(name, f"it has no {LATEST}")
    for alias in function.aliases.values():
        try:
            pointed(name, alias.name, alias.versions, alias.description, function.labels())
        except (InvalidRequest, NotFound) as error:
            raise _unfit(name, f"alias {alias.name}: {error.message}") from error
    for qualifier in function.provisioned:
        if qualifier == LATEST or not (qualifier in function.aliases or function.find(qualifier)):
            raise _unfit(name, f"{qualifier[:_SHOWN]} has provisioned instances, and is not there")


def _unfit(name: str, why: str) -> HostError:
    return HostError(
        f"the journal's rows of function {name[:_SHOWN]!r} do not fit together: {why}",
        hint="mend them with sqlite3, or move state_dir away",
    )
