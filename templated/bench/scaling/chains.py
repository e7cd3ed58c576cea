"""Call chains A -> B -> C on a virtual clock: are B and C warm when they are called?

Instances expire long before a chain runs again, so that each of its starts is cold unless somebody
knew. Beside the chains there are functions that have nothing to do with them, and B and C are also
called by others now and then.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click

from templated.cli import render
from templated.cli.options import Settings, command
from templated.scaling.chains import Agenda, Chains

MODES = ("without", "traced", "timing")
"""No prediction; requests that name their caller; nothing but the times of starts."""
LEARNING = 20
"""Runs of a chain after which it is measured."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What is simulated; times in seconds."""

    chains: int = 50
    noise: int = 40
    keep_alive: float = 60.0
    gaps: tuple[float, float] = (90.0, 510.0)
    """Between two runs of a chain."""
    lags: tuple[float, float] = (0.05, 5.0)
    jitter: float = 0.2
    """Of a lag, each time, up and down."""
    starts: tuple[float, float] = (0.06, 0.15)
    """An instance's start from the pool, and a direct one. Requests that wait take from the pool
    while there is something in it, and so does what is started ahead, when it is urgent."""
    pool: int = 8
    refill: float = 1.0
    """Of one member, one after the other."""
    stray: float = 1 / 1800
    """Calls of each B and C by others, per second."""
    lead: float = 0.2
    """How long before it is needed an instance is started."""
    least: float = 0.3


@dataclass(frozen=True)
class _Call:
    """One function of a chain calls another."""

    callee: str
    lag: float
    fan_out: int
    varies: bool
    chance: float


@dataclass
class _Instances:
    """Those of one function; each that rests as (until, since, whether it waits for its first)."""

    resting: list[tuple[float, float, bool]] = field(default_factory=list)
    starting: list[tuple[float, float]] = field(default_factory=list)
    """When it will be ready, until when it is wanted."""
    busy: int = 0


class _Simulation:
    def __init__(self, world: World, seed: int, runs: int, mode: str) -> None:
        self.world, self.mode, self.runs = world, mode, runs
        self._load = random.Random(seed)  # noqa: S311  # to be repeated, not to be secret
        self.chains, self.agenda = Chains(), Agenda()
        self._calls: dict[str, _Call] = {}
        self._instances: dict[str, _Instances] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.now = self.waited = 0.0
        self._refilled: list[float] = []
        """When members that were taken from the pool will have been replaced."""
        self.starts = {"b": [0, 0], "c": [0, 0], "first": [0, 0]}
        """By place in a chain, and the first of each B and C in a run: all, warm."""
        self._seen: set[tuple[str, int]] = set()
        self.cold_runs: set[tuple[str, int]] = set()
        self.requests = self.prewarmed = self.wasted = 0
        self.idle = 0.0
        self.seconds = {"learn": 0.0, "predict": 0.0}
        self._plan()

    # --- the load -------------------------------------------------------------------------------

    def _plan(self) -> None:
        for number in range(self.world.chains):
            self._draw_chain(number)
        end = max(self._plan_chain(number) for number in range(self.world.chains))
        for number in range(self.world.noise):
            self._plan_noise(f"noise-{number}", number % 4, end)

    def _draw_chain(self, number: int) -> None:
        draw, world = self._load, self.world
        for caller, callee, most in (("a", "b", 4), ("b", "c", 3)):
            first, last = world.lags
            self._calls[f"{caller}-{number}"] = _Call(
                callee=f"{callee}-{number}",
                lag=first * (last / first) ** draw.random(),
                fan_out=draw.randint(1, most),
                varies=draw.random() < 0.5,
                chance=draw.choice((1.0, 1.0, 0.8)),
            )

    def _plan_chain(self, number: int) -> float:
        draw, world = self._load, self.world
        at = draw.uniform(*world.gaps)
        for run in range(self.runs):
            self._at(at, self._arrive, f"a-{number}", None, run)
            at += draw.uniform(*world.gaps)
        for name in (f"b-{number}", f"c-{number}"):
            self._poisson(name, world.stray, at)
        return at

    def _plan_noise(self, name: str, kind: int, end: float) -> None:
        draw = self._load
        if kind == 0:
            at, period = draw.uniform(0, 60), draw.choice((30.0, 60.0, 300.0))
            while at < end:
                self._at(at, self._arrive, name, None, None)
                at += period
            return
        rate = 0.2 * (1 / 120) ** draw.random()
        self._poisson(name, rate, end, burst=6 if kind == 1 else 1)

    def _poisson(self, name: str, rate: float, end: float, burst: int = 1) -> None:
        draw = self._load
        at = draw.expovariate(rate)
        while at < end:
            for _ in range(draw.randint(1, burst)):
                self._at(at + draw.uniform(0, 3) * (burst > 1), self._arrive, name, None, None)
            at += draw.expovariate(rate / burst)

    # --- what happens ---------------------------------------------------------------------------

    def run(self) -> None:
        """To the last event."""
        while self._events:
            self.now, _, what, arguments = heapq.heappop(self._events)
            what(*arguments)

    def _at(self, at: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (at, next(self._order), what, arguments))

    def _arrive(self, function: str, caller: tuple[str, int] | None, run: int | None) -> None:
        self.requests += 1
        wait = self._route(function)
        if self.mode != "without":
            self._told(function, caller if self.mode == "traced" else None, wait)
        place = function[0]
        if run is not None and run >= LEARNING and place in self.starts:
            first = () if (function, run) in self._seen else ("first",)
            self._seen.add((function, run))
            for counted in (place, *first):
                self.starts[counted][0] += 1
                self.starts[counted][1] += not wait
            self.waited += wait
            if wait:
                self.cold_runs.add((function[2:], run))
        self._at(self.now + wait, self._begin, function, run)

    def _told(self, function: str, caller: tuple[str, int] | None, wait: float) -> None:
        begin = time.thread_time()
        if caller is None:
            self.chains.arrived(function, self.now)
        else:
            self.chains.arrived(function, self.now, caller=caller[0], run=caller[1])
        learned = time.thread_time()
        # How long a start takes it knows but roughly.
        wait = max(self.world.starts) if wait else 0.0
        expected = self.chains.expected(function, self.now, wait=wait, least=self.world.least)
        self.seconds["learn"] += learned - begin
        self.seconds["predict"] += time.thread_time() - learned
        self.agenda.add(function, expected)
        for one in expected:
            due = max(one.begin - self.world.lead, self.now)
            self._at(due, self._prepare, one.function, one.begin)

    def _begin(self, function: str, run: int | None) -> None:
        number = next(self._order)
        if self.mode != "without":
            begin = time.thread_time()
            self.chains.began(function, self.now, number)
            self.seconds["learn"] += time.thread_time() - begin
        took, call = self._load.uniform(0.05, 0.3), self._calls.get(function)
        # Others who call B do not make it call C.
        if call is not None and run is not None and self._load.random() < call.chance:
            count = self._load.randint(1, call.fan_out) if call.varies else call.fan_out
            jitter = self.world.jitter
            for _ in range(count):
                lag = call.lag * self._load.uniform(1 - jitter, 1 + jitter)
                took = max(took, lag + 0.1)
                self._at(self.now + lag, self._arrive, call.callee, (function, number), run)
        self._at(self.now + took, self._end, function, took)

    def _end(self, function: str, took: float) -> None:
        if self.mode != "without":
            begin = time.thread_time()
            self.chains.ended(function, took)
            self.seconds["learn"] += time.thread_time() - begin
        instances = self._instances[function]
        instances.busy -= 1
        instances.resting.append((self.now + self.world.keep_alive, self.now, False))

    # --- instances ------------------------------------------------------------------------------

    def _route(self, function: str) -> float:
        """Seconds until an instance has the request."""
        instances = self._alive(function)
        instances.busy += 1
        if instances.resting:
            _, since, first = instances.resting.pop()
            self.idle += (self.now - since) * first
            return 0.0
        if instances.starting and instances.starting[0][0] < self.now + self.world.starts[0]:
            return instances.starting.pop(0)[0] - self.now
        start = self._start(urgent=True)
        if instances.starting and instances.starting[0][0] < self.now + start:
            return instances.starting.pop(0)[0] - self.now
        return start

    def _start(self, *, urgent: bool) -> float:
        """Seconds that the start of one more instance takes."""
        pooled, direct = self.world.starts
        self._refilled = [at for at in self._refilled if at > self.now]
        if not urgent or len(self._refilled) >= self.world.pool:
            return direct
        last = self._refilled[-1] if self._refilled else self.now
        self._refilled.append(last + self.world.refill)
        return pooled

    def _prepare(self, function: str, begin: float) -> None:
        wanted = self.agenda.wanted(function, self.now, self.world.lead)
        if wanted is None:
            return
        instances = self._alive(function)
        there = len(instances.resting) + len(instances.starting) + instances.busy
        for _ in range(wanted.count - there):
            self.prewarmed += 1
            ready = self.now + self._start(urgent=begin - self.now < self.world.starts[1])
            instances.starting.append((ready, max(wanted.until, ready)))
        instances.starting.sort()

    def _alive(self, function: str) -> _Instances:
        """Those that are there now."""
        instances = self._instances.setdefault(function, _Instances())
        while instances.starting and instances.starting[0][0] <= self.now:
            ready, until = instances.starting.pop(0)
            instances.resting.append((until, ready, True))
        for until, since, first in instances.resting:
            if until < self.now and first:
                self.wasted += 1
                self.idle += until - since
        instances.resting = [one for one in instances.resting if one[0] >= self.now]
        return instances

    # --- what came of it ------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Shares of warm starts, and what they cost."""
        measured = self.world.chains * (self.runs - LEARNING)
        starts = self.starts["b"][0] + self.starts["c"][0]
        figures = {
            **{place: round(warm / max(all_, 1), 4) for place, (all_, warm) in self.starts.items()},
            "runs": round(1 - len(self.cold_runs) / max(measured, 1), 4),
            "starts": starts,
            "wait_ms": round(self.waited / max(starts, 1) * 1e3, 2),
        }
        if self.mode == "without":
            return figures
        acting = [e for e in self.chains.edges() if e.sure >= self.world.least]
        timers = [e for e in acting if _timer(e.caller) and _timer(e.callee)]
        false = [e for e in acting if e not in timers and e.caller[1:] != e.callee[1:]]
        return figures | {
            "prewarmed": self.prewarmed,
            "unused": round(self.wasted / max(self.prewarmed, 1), 4),
            "idle_s_each": round(self.idle / max(self.prewarmed, 1), 2),
            "edges": len(acting),
            "false_edges": len(false),
            "timer_edges": len(timers),
            "learn_us": round(self.seconds["learn"] / self.requests * 1e6, 1),
            "predict_us": round(self.seconds["predict"] / self.requests * 1e6, 1),
        }


def _timer(function: str) -> bool:
    kind, _, number = function.partition("-")
    return kind == "noise" and int(number) % 4 == 0


def run(seed: int = 1, runs: int = 200, world: World = World()) -> dict[str, Any]:
    """Each chain `runs` times, in each of `MODES`, with the same load.

    For each mode the shares of warm starts of `b` and `c`, of the `first` of each in a run (a later
    one may find an instance that the run itself has made), and of `runs` in which all were warm,
    once a chain ran `LEARNING` times, and how long they waited for an instance; how many instances
    were started ahead, which part of them unused, and how long each waited; edges that
    are acted upon, of them false ones, between functions that have nothing to do with each other,
    and those between timers, which do follow each other; what a request costs, in microseconds of
    CPU.
    """
    figures: dict[str, Any] = {"kind": "chains", "seed": seed, "runs": runs}
    for mode in MODES:
        simulation = _Simulation(world, seed, runs, mode)
        simulation.run()
        figures[mode] = simulation.figures()
    return figures


_EXAMPLES = """
templated bench scaling chains
templated bench scaling chains --runs 1000 --chains 10 --seed 7 -o json
"""


@command("chains", examples=_EXAMPLES)
@click.option("--runs", type=click.IntRange(LEARNING + 1, 100_000), default=200, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--chains", "count", type=click.IntRange(1, 100), default=50, show_default=True)
@click.option("--noise", type=click.IntRange(0, 1000), default=40, show_default=True)
@click.pass_obj
def chains(settings: Settings, runs: int, seed: int, count: int, noise: int) -> None:
    """Are B and C warm when A leads to them? On a virtual clock, without a daemon.

    Chains A -> B -> C with lags of 50 ms to 5 s and up to 12 calls of a C, each `--runs` times, so
    far apart that all instances have expired, between `--noise` unrelated functions: without
    prediction, with trace ids, and by timing alone.
    """
    figures = run(seed, runs, World(chains=count, noise=noise))
    if not settings.table:
        render.dump(figures, settings)
        return
    rows = [
        [mode, *(f"{figures[mode][place]:.1%}" for place in ("b", "c", "first", "runs"))]
        + [figures[mode].get(key, "") for key in _COLUMNS]
        for mode in MODES
    ]
    render.table(["MODE", "B WARM", "C WARM", "FIRST", "RUNS WARM", *_COLUMNS.values()], rows)


_COLUMNS = {
    "wait_ms": "WAIT MS",
    "prewarmed": "STARTED AHEAD",
    "unused": "UNUSED",
    "idle_s_each": "WAITED S",
    "false_edges": "FALSE EDGES",
    "timer_edges": "TIMERS",
    "learn_us": "LEARN US",
    "predict_us": "PREDICT US",
}
