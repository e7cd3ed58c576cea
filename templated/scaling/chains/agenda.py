"""What is expected of each function in the next seconds, from all runs under way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from templated.scaling.chains.expected import Expected

# Expectations of one function; those that end first give way.
_MOST = 256


@dataclass(frozen=True)
class Wanted:
    """Instances of a function that calls will need."""

    count: int
    until: float
    reason: str
    sure: float


class Agenda:
    """Expectations until their time has passed.

    Those of several runs of one function add up. Those of several functions do not: when A leads
    to C by way of B, and B begins, its own answer is about the same requests.
    """

    def __init__(self) -> None:
        self._expected: dict[str, list[tuple[str, Expected]]] = {}

    def add(self, source: str, expected: Iterable[Expected]) -> None:
        """A run of `source` leads to these."""
        for one in expected:
            known = self._expected.setdefault(one.function, [])
            known.append((source, one))
            if len(known) > _MOST:
                known.remove(min(known, key=lambda entry: entry[1].end))

    def arrived(self, function: str) -> None:
        """One of the requests that were expected has come: it is so no more.

        Of each source the one that was to come first: all of them may have been about it.
        """
        entries = self._expected.get(function)
        if not entries:
            return
        first: dict[str, tuple[str, Expected]] = {}
        for entry in entries:
            known = first.get(entry[0])
            if known is None or entry[1].begin < known[1].begin:
                first[entry[0]] = entry
        for source, one in first.values():
            at = entries.index((source, one))
            if one.at_once > 1:
                entries[at] = source, one._replace(at_once=one.at_once - 1)
            else:
                del entries[at]

    def wanted(self, function: str, now: float, lead: float = 0.0) -> Wanted | None:
        """What has to be there `lead` seconds from now; None: nothing is expected by then."""
        entries = self._expected.get(function)
        if entries is None:
            return None
        entries[:] = [(source, one) for source, one in entries if one.end >= now]
        if not entries:
            del self._expected[function]
        due = [(source, one) for source, one in entries if one.begin - lead <= now]
        if not due:
            return None
        counts: dict[str, int] = {}
        for source, one in due:
            counts[source] = counts.get(source, 0) + one.at_once
        surest = max((one for _, one in due), key=lambda one: one.sure)
        return Wanted(
            count=max(counts.values()),
            until=max(one.end for _, one in due),
            reason=surest.reason,
            sure=surest.sure,
        )

    def functions(self) -> list[str]:
        """Those of which something is, or was, expected."""
        return list(self._expected)

    def forget(self, function: str) -> None:
        """It is gone."""
        self._expected.pop(function, None)
