"""Learns call chains, and says what a start leads to.

A request that names the run that made it is an edge at once. Where nothing names it, timing does:
see `suspects`. When a function starts, what it leads to is expected, and what that leads to in
turn. Lags are counted from when the caller's handler began, which a cold start does not move, to
when the callee's request arrived, so that what is learned holds once the callee is kept warm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from templated.scaling.chains import saved
from templated.scaling.chains.edges import REMEMBERED, Edge, Outcome, at_once
from templated.scaling.chains.expected import Expected, expectations
from templated.scaling.chains.recent import Recent
from templated.scaling.chains.suspects import REACH, Peak, Suspect

HORIZON = 60.0
"""The longest lag of a call that is known to be one, in seconds."""
# Arrivals of one function that are closer than this, in seconds, are one as far as timing goes.
_SAME = 0.25
# What arrives more often than every so many seconds is warm anyway: nobody is suspected.
_BUSY = 10.0
# Functions that may become suspects are taken from so many that began of late, and have to have
# begun before so many arrivals in a row.
_SIEVE, _SIEVED = 128, 3
# Arrivals after which those without prospects are let off.
_TURNS = 8
# What begins that many times as often as another arrives does not lead to it in enough runs.
_BUSIER = 4.0
_SMOOTH = 0.25
# Calls of one function that one run is followed for.
_CALLS = 256


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much is remembered."""

    functions: int = 4096
    edges: int = 4096
    callees: int = 16
    """Edges from one function; as many to one."""
    runs: int = 32
    """Runs of one function that are followed at once; others are not counted at all."""
    suspects: int = 16
    """Of one function; in all at most `all_suspects`."""
    all_suspects: int = 16384
    age: float = 14 * 86400.0
    """Seconds after which an edge that was not confirmed counts no more."""


class _Run(NamedTuple):
    began: float
    calls: dict[str, list[float]]
    """The lags of what it led to, by function."""


@dataclass(eq=False, slots=True)
class _Function:
    callees: dict[str, Edge] = field(default_factory=dict)
    callers: dict[str, Edge] = field(default_factory=dict)
    runs: dict[Hashable, _Run] = field(default_factory=dict)
    took: float | None = None
    """Seconds that a request runs, smoothed."""
    # For what timing says: its own windows, and whom it seems to follow.
    windows: int = 0
    opened: float | None = None
    gap: float | None = None
    """Seconds between windows, smoothed."""
    suspects: dict[str, Suspect] = field(default_factory=dict)
    sieve: set[str] | None = None
    """Functions that the last `sieved` arrivals have followed."""
    sieved: int = 0
    looked: int = 0
    turn: int = 0
    arrived: float | None = None
    pause: float | None = None
    """Seconds between arrivals, smoothed."""


class Chains:
    """What is known of calls between functions, which any strings name.

    It is told of each request when it `arrived`, when its handler `began` and, if possible, when
    it `ended`. Times are in seconds, by any clock that all calls share; lags that a jump of it
    makes up are left out. Nothing here raises.
    """

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self._bounds = bounds
        # What was used last is last, and edges that were confirmed last. A plain dict would find
        # its first entry the more slowly the more were moved away from there.
        self._functions: OrderedDict[str, _Function] = OrderedDict()
        self._edges: OrderedDict[tuple[str, str], Edge] = OrderedDict()
        # Functions whose window is open.
        self._open = Recent(REACH)
        self._suspects = 0

    # --- learning -------------------------------------------------------------------------------

    def arrived(
        self, function: str, now: float, *, caller: str | None = None, run: Hashable = None
    ) -> None:
        """A request came. `caller` made it, in its `run`, where that is known."""
        callee = self._function(function)
        if caller is None:
            self._attribute(callee, now)
            self._suspect(function, callee, now)
            return
        known = self._functions.get(caller)
        followed = known.runs.get(run) if known else None
        if known is None or followed is None or not 0 <= now - followed.began <= HORIZON:
            return
        edge = known.callees.get(function)
        if edge is None:
            edge = self._add(Edge(caller, function, True, now))
        edge.traced = True
        self._confirm(edge, followed, now)

    def began(self, function: str, now: float, run: Hashable = None) -> None:
        """The handler of a request began; `run` names it in what it will call."""
        caller = self._function(function)
        self._settle(caller, now)
        if len(caller.runs) < self._bounds.runs:
            caller.runs[object() if run is None else run] = _Run(now, {})
        if caller.opened is None or not 0 <= now - caller.opened < REACH:
            caller.gap = _smoothed(caller.gap, caller.opened, now)
            caller.opened = now
            caller.windows += 1
            self._open.add(function, now)

    def ended(self, function: str, seconds: float) -> None:
        """A request ran for so long: what runs one after the other needs one instance."""
        known = self._functions.get(function)
        if known is not None and 0 <= seconds < float("inf"):
            took = seconds if known.took is None else known.took
            known.took = took + _SMOOTH * (seconds - took)

    # --- asking ---------------------------------------------------------------------------------

    def expected(
        self, function: str, now: float, *, wait: float = 0.0, least: float = 0.3
    ) -> tuple[Expected, ...]:
        """What a request of `function` that arrives now leads to, the earliest first.

        Its handler begins at the latest `wait` seconds from now: 0 when an instance is free, else
        what a start takes. What is less sure than `least` is left out.
        """

        def callees(name: str) -> Iterator[Edge]:
            known = self._functions.get(name)
            for edge in known.callees.values() if known else ():
                if now - edge.seen <= self._bounds.age:
                    yield edge

        return expectations(callees, function, (now, now + wait), least)

    def edges(self, function: str | None = None) -> list[Edge]:
        """All edges, or those from and to one function."""
        return [e for e in self._edges.values() if function in (None, e.caller, e.callee)]

    # --- keeping --------------------------------------------------------------------------------

    def forget(self, function: str) -> None:
        """It is gone, with all edges from it and to it."""
        known = self._functions.pop(function, None)
        if known is not None:
            self._suspects -= len(known.suspects)
            for edge in (*known.callees.values(), *known.callers.values()):
                self._drop(edge)

    def save(self, now: float) -> dict[str, Any]:
        """All edges, as what JSON can hold. Suspects and runs under way are not kept."""
        age = self._bounds.age
        return saved.save([e for e in self._edges.values() if now - e.seen <= age], now)

    def load(self, plain: Mapping[str, Any], now: float) -> None:
        """Add saved edges, as old as they were then. What is broken is left out."""
        for edge in saved.load(plain, now):
            if (edge.caller, edge.callee) not in self._edges:
                self._add(edge)

    # --- runs -----------------------------------------------------------------------------------

    def _settle(self, caller: _Function, now: float) -> None:
        """Count the runs of which nothing more is to come."""
        runs = caller.runs
        while runs:
            key, run = next(iter(runs.items()))
            age = now - run.began
            if 0 <= age <= HORIZON:
                return
            del runs[key]
            if age > 0:
                self._count(caller, run)

    def _count(self, caller: _Function, run: _Run) -> None:
        for edge in list(caller.callees.values()):
            lags = run.calls.get(edge.callee)
            callee = self._functions[edge.callee]
            edge.ran(Outcome(min(lags), max(lags), at_once(lags, callee.took)) if lags else None)
            if edge.rare or edge.by_chance(callee.pause):
                self._drop(edge)

    def _confirm(self, edge: Edge, run: _Run, now: float) -> None:
        lags = run.calls.setdefault(edge.callee, [])
        if len(lags) < _CALLS:
            lags.append(now - run.began)
        edge.seen = now
        self._edges.move_to_end((edge.caller, edge.callee))

    # --- by timing ------------------------------------------------------------------------------

    def _attribute(self, callee: _Function, now: float) -> None:
        """Give an arrival to the run of each function that it seems to follow."""
        for edge in callee.callers.values():
            if edge.traced:
                continue
            runs = self._functions[edge.caller].runs.values()
            fit = [run for run in runs if edge.fits(now - run.began)]
            if fit:
                self._confirm(edge, min(fit, key=lambda r: len(r.calls.get(edge.callee, ()))), now)

    def _suspect(self, function: str, callee: _Function, now: float) -> None:
        """Look for the function that an arrival follows."""
        if callee.arrived is not None and 0 <= now - callee.arrived < _SAME:
            return
        callee.pause = _smoothed(callee.pause, callee.arrived, now)
        callee.arrived = now
        if callee.pause is not None and callee.pause < _BUSY:
            return
        callee.turn += 1
        if callee.turn % _TURNS == 0:
            self._let_off(callee)
        self._look(function, callee, now)
        peaks = []
        for name, suspect in callee.suspects.items():
            caller = self._functions.get(name)
            if caller is not None and caller.opened is not None:
                lag = now - caller.opened
                if 0 <= lag < REACH:
                    peak = suspect.hit(lag, caller.windows)
                    if peak is not None:
                        peaks.append((name, peak))
        for name, peak in peaks:
            self._acquit(callee, name)
            if name not in callee.callers:
                self._believe(name, function, peak, now)

    def _let_off(self, callee: _Function) -> None:
        """Make room for others than those that have had their time."""
        for name, suspect in list(callee.suspects.items()):
            caller = self._functions.get(name)
            if caller is None or name in callee.callers or suspect.hopeless(caller.windows):
                self._acquit(callee, name)

    def _acquit(self, callee: _Function, name: str) -> None:
        del callee.suspects[name]
        self._suspects -= 1

    def _look(self, function: str, callee: _Function, now: float) -> None:
        """Add suspects, while there is room."""
        room = self._bounds.suspects - len(callee.suspects)
        room = min(room, self._bounds.all_suspects - self._suspects)
        for name in islice(self._followed(callee, room, now), room):
            caller = self._functions.get(name)
            known = name == function or name in callee.callers or name in callee.suspects
            if caller is None or known:
                continue
            if caller.gap and callee.pause and callee.pause > _BUSIER * caller.gap:
                continue
            callee.suspects[name] = Suspect(caller.windows)
            self._suspects += 1

    def _followed(self, callee: _Function, room: int, now: float) -> Iterable[str]:
        """Functions that an arrival follows: when those are many, and only then, such as the
        arrivals before have followed, too."""
        if room <= 0:
            return ()
        names = self._open.names(now)
        if not callee.sieve:
            if len(names) <= room:
                return names
            # In turn, when they are more than that.
            skipped = callee.looked * _SIEVE % len(names) if len(names) > _SIEVE else 0
            callee.looked += 1
            callee.sieve = set(names[skipped : skipped + _SIEVE])
            callee.sieved = 1
            return ()
        left = callee.sieve.intersection(names)
        callee.sieved += 1
        callee.sieve = left if callee.sieved < _SIEVED else None
        return () if callee.sieve else left

    def _believe(self, caller: str, callee: str, peak: Peak, now: float) -> None:
        edge = self._add(Edge(caller, callee, False, now))
        # What was seen of it before, as far as a histogram tells.
        runs = min(peak.seen, REMEMBERED)
        hits = min(round(peak.found / peak.seen * runs), runs)
        edge.ran(*[None] * (runs - hits), *[Outcome(peak.first, peak.last, 1)] * hits)
        # Of the runs under way it is not known what they have led to.
        self._functions[caller].runs.clear()

    # --- bounds ---------------------------------------------------------------------------------

    def _function(self, name: str) -> _Function:
        known = self._functions.get(name)
        if known is None:
            known = self._functions[name] = _Function()
            if len(self._functions) > self._bounds.functions:
                self._evict()
        else:
            self._functions.move_to_end(name)
        return known

    def _evict(self) -> None:
        """Forget a function that was not used for long, rather one that has no edges."""
        # The last two are in use.
        oldest = list(islice(self._functions, min(16, len(self._functions) - 2)))
        for name in oldest:
            known = self._functions[name]
            if not known.callees and not known.callers:
                self.forget(name)
                return
        self.forget(oldest[0])

    def _add(self, edge: Edge) -> Edge:
        caller, callee = self._function(edge.caller), self._function(edge.callee)
        for same in (caller.callees, callee.callers):
            if len(same) >= self._bounds.callees:
                self._drop(min(same.values(), key=lambda known: (known.sure, known.seen)))
        if len(self._edges) >= self._bounds.edges:
            self._drop(next(iter(self._edges.values())))
        caller.callees[edge.callee] = callee.callers[edge.caller] = edge
        self._edges[edge.caller, edge.callee] = edge
        return edge

    def _drop(self, edge: Edge) -> None:
        self._edges.pop((edge.caller, edge.callee), None)
        caller, callee = self._functions.get(edge.caller), self._functions.get(edge.callee)
        if caller is not None:
            caller.callees.pop(edge.callee, None)
        if callee is not None:
            callee.callers.pop(edge.caller, None)


def _smoothed(old: float | None, since: float | None, now: float) -> float | None:
    """A mean of times between, with the one since then; a clock that went back adds nothing."""
    if since is None or now <= since:
        return old
    return now - since if old is None else old + _SMOOTH * (now - since - old)
