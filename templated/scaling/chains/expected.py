"""What a run leads to, directly and by way of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import NamedTuple

from templated.scaling.chains.edges import Edge

# Calls in a row that are followed; edges looked at, and instances wanted, for one start.
_DEEPEST, _EDGES, _MOST = 4, 128, 1000


class Expected(NamedTuple):
    """Requests that a run will probably lead to."""

    function: str
    at_once: int
    """How many at most."""
    begin: float
    end: float
    """Between these they will arrive, by the clock of the question."""
    sure: float
    """A lower bound of how likely that is, 0 to 1."""
    lag: float
    """The usual one, in seconds after the run began."""
    path: tuple[str, ...]
    """From the function that runs, to this one."""
    traced: bool
    """Whether all calls in between are known to be calls."""

    @property
    def reason(self) -> str:
        """Why, in words."""
        first, *between, _ = self.path
        way = f" by way of {', '.join(between)}" if between else ""
        lag = f"{self.lag:.2g} s" if self.lag < 1 else f"{self.lag:.1f} s"
        if self.traced:
            return f"{first} calls it{way} in {lag}"
        return f"it follows {first}{way} after {lag}"

    def along(self, edge: Edge) -> Expected:
        """What follows from that by one more call."""
        return Expected(
            edge.callee,
            min(self.at_once * edge.count, _MOST),
            self.begin + edge.first,
            self.end + edge.last,
            self.sure * edge.sure,
            self.lag + edge.typical,
            (*self.path, edge.callee),
            self.traced and edge.traced,
        )


def expectations(
    callees: Callable[[str], Iterable[Edge]],
    function: str,
    begins: tuple[float, float],
    least: float,
) -> tuple[Expected, ...]:
    """What a run that begins between two times leads to, the earliest first; a circle is followed
    once."""
    found: dict[str, list[Expected]] = {}
    looked = 0
    todo = [Expected(function, 1, *begins, 1.0, 0.0, (function,), True)]
    for way in todo:
        for edge in callees(way.function):
            looked += 1
            if way.sure * edge.sure < least or edge.callee in way.path:
                continue
            further = way.along(edge)
            _add(found.setdefault(edge.callee, []), further)
            if len(further.path) <= _DEEPEST and looked < _EDGES:
                todo.append(further)
    every = [one for same in found.values() for one in same]
    return tuple(sorted(every, key=_begin))


_begin = attrgetter("begin")


def _add(ways: list[Expected], other: Expected) -> None:
    """Join ways that lead to the same function in the same time.

    Calls that are known to be ones add up. What only follows was perhaps seen twice, once by way
    of another, and counts once.
    """
    for at, way in enumerate(ways):
        if way.begin <= other.end and other.begin <= way.end:
            surer = max(way, other, key=attrgetter("sure"))
            both = way.traced and other.traced
            ways[at] = surer._replace(
                at_once=way.at_once + other.at_once if both else max(way.at_once, other.at_once),
                begin=min(way.begin, other.begin),
                end=max(way.end, other.end),
            )
            return
    ways.append(other)
