"""What a run leads to, directly and by way of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from templated.scaling.chains.edges import Edge

# Calls in a row that are followed; edges looked at, and instances wanted, for one start.
_DEEPEST, _EDGES, _MOST = 4, 128, 1000


@dataclass(frozen=True)
class Expected:
    """Requests that a run will probably lead to."""

    function: str
    count: int
    """How many at once, at most."""
    begin: float
    end: float
    """Between these they will arrive, by the clock of the question."""
    sure: float
    """A lower bound of how likely that is, 0 to 1."""
    reason: str
    traced: bool
    """Whether all calls in between are known to be calls."""


@dataclass(frozen=True, slots=True)
class _Way:
    """From a run to a function."""

    path: tuple[str, ...]
    first: float = 0.0
    last: float = 0.0
    typical: float = 0.0
    count: int = 1
    sure: float = 1.0
    traced: bool = True

    def along(self, edge: Edge) -> _Way:
        return _Way(
            path=(*self.path, edge.callee),
            first=self.first + edge.first,
            last=self.last + edge.last,
            typical=self.typical + edge.typical,
            count=min(self.count * edge.count, _MOST),
            sure=self.sure * edge.sure,
            traced=self.traced and edge.traced,
        )

    def reason(self) -> str:
        begin, *between, _ = self.path
        way = f" by way of {', '.join(between)}" if between else ""
        lag = f"{self.typical:.2g} s" if self.typical < 1 else f"{self.typical:.1f} s"
        if self.traced:
            return f"{begin} calls it{way} in {lag}"
        return f"it follows {begin}{way} after {lag}"


def expectations(
    callees: Callable[[str], Iterable[Edge]],
    function: str,
    begins: tuple[float, float],
    least: float,
) -> tuple[Expected, ...]:
    """What a run that begins between two times leads to, the earliest first; a circle is followed
    once."""
    found: dict[str, list[_Way]] = {}
    todo, looked = [_Way((function,))], 0
    for way in todo:
        for edge in callees(way.path[-1]):
            looked += 1
            if way.sure * edge.sure < least or edge.callee in way.path:
                continue
            further = way.along(edge)
            _add(found.setdefault(edge.callee, []), further)
            if len(further.path) <= _DEEPEST and looked < _EDGES:
                todo.append(further)
    ways = sorted((way for same in found.values() for way in same), key=lambda way: way.first)
    return tuple(
        Expected(
            function=way.path[-1],
            count=way.count,
            begin=begins[0] + way.first,
            end=begins[1] + way.last,
            sure=way.sure,
            reason=way.reason(),
            traced=way.traced,
        )
        for way in ways
    )


def _add(ways: list[_Way], other: _Way) -> None:
    """Join ways that lead to the same function in the same time.

    Calls that are known to be ones add up. What only follows was perhaps seen twice, once by way
    of another, and counts once.
    """
    for at, way in enumerate(ways):
        if way.first <= other.last and other.first <= way.last:
            surer = max(way, other, key=lambda one: one.sure)
            both = way.traced and other.traced
            ways[at] = _Way(
                path=surer.path,
                first=min(way.first, other.first),
                last=max(way.last, other.last),
                typical=surer.typical,
                count=way.count + other.count if both else max(way.count, other.count),
                sure=surer.sure,
                traced=surer.traced,
            )
            return
    ways.append(other)
