"""Call chains: what is learned from traces and from timing, and what is not."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from templated.bench.scaling import chains as bench
from templated.scaling.chains import Agenda, Bounds, Chains, Expected
from templated.scaling.chains.edges import REMEMBERED, at_once
from templated.scaling.chains.recent import Recent
from templated.scaling.chains.suspects import REACH

Start = tuple[float, str]
GAP = 300.0


def due(agenda: Agenda, now: float) -> list[str]:
    """The functions that have to be there now."""
    return [name for name in agenda.functions() if agenda.wanted(name, now)]


def traced(chains: Chains, at: float, calls: Iterable[Start], caller: str = "a") -> None:
    """One run of a function, with what it calls; lag and name of each."""
    chains.began(caller, at, at)
    for lag, callee in calls:
        chains.arrived(callee, at + lag, caller=caller, run=at)


def taught(runs: int = 20, calls: Iterable[Start] = ((1.2, "b"),)) -> tuple[Chains, float]:
    """Chains in which `a` has called these; and the time."""
    chains, calls = Chains(), list(calls)
    for run in range(runs):
        traced(chains, run * GAP, calls)
    return chains, runs * GAP


def played(starts: Iterable[Start], chains: Chains | None = None) -> Chains:
    """Starts of which nobody says who made them."""
    chains = chains or Chains()
    for at, function in sorted(starts):
        chains.arrived(function, at)
        chains.began(function, at)
    return chains


def drawn(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311


def poisson(draw: random.Random, name: str, rate: float, end: float) -> Iterator[Start]:
    at = draw.expovariate(rate)
    while at < end:
        yield at, name
        at += draw.expovariate(rate)


def pairs(chains: Chains, least: float = 0.3) -> set[tuple[str, str]]:
    """The edges that are acted upon."""
    return {(edge.caller, edge.callee) for edge in chains.edges() if edge.sure >= least}


def only(expected: tuple[Expected, ...]) -> Expected:
    (one,) = expected
    return one


# --- with traces ----------------------------------------------------------------------------------


def test_a_call_is_expected_once_it_was_seen() -> None:
    chains, now = taught(1)
    assert chains.expected("a", now) == (), "the run may go on"
    chains.began("a", now)
    assert only(chains.expected("a", now)).sure < 0.4, "it may be a whim"
    chains, now = taught(3)
    assert chains.expected("a", now, least=0.9) == ()
    expected = only(chains.expected("a", now))
    assert (expected.function, expected.at_once, expected.traced) == ("b", 1, True)
    assert now + 1.0 < expected.begin < now + 1.2 < expected.end < now + 1.4
    assert expected.reason == "a calls it in 1.2 s" and 0.5 < expected.sure < 0.6
    chains, now = taught(30)
    assert 0.9 < only(chains.expected("a", now)).sure < 1
    assert chains.expected("b", now) == chains.expected("nobody", now) == ()


def test_a_caller_that_waits_for_its_start() -> None:
    chains, now = taught()
    at_once, later = (only(chains.expected("a", now, wait=wait)) for wait in (0.0, 2.0))
    assert later.begin == at_once.begin and later.end == at_once.end + 2.0


def test_what_a_call_leads_to_is_expected_too() -> None:
    chains = Chains()
    for run in range(20):
        at = run * GAP
        traced(chains, at, [(1.0, "b"), (1.0, "b")])
        traced(chains, at + 1.0, [(0.5, "c"), (0.5, "c"), (0.5, "c")], caller="b")
        traced(chains, at + 1.5, [(0.25, "d")], caller="c")
    b, c, d = chains.expected("a", 1e4)
    assert [one.function for one in (b, c, d)] == ["b", "c", "d"]
    assert [one.at_once for one in (b, c, d)] == [2, 6, 6], "each b of two calls three of c"
    assert c.begin < 1e4 + 1.5 < c.end and d.begin < 1e4 + 1.75 < d.end
    assert c.reason == "a calls it by way of b in 1.5 s"
    assert d.reason == "a calls it by way of b, c in 1.8 s"
    assert b.sure > c.sure > d.sure > 0.5


def test_circles_end() -> None:
    chains = Chains()
    for run in range(20):
        at = run * GAP
        traced(chains, at, [(1.0, "b"), (1.0, "a")])
        traced(chains, at + 1.0, [(1.0, "a")], caller="b")
    assert [one.function for one in chains.expected("a", 1e4)] == ["b"]
    assert [one.function for one in chains.expected("b", 1e4)] == ["a"]
    chains.forget("a")
    assert chains.edges() == [] and chains.expected("b", 1e4) == ()


def test_two_ways_to_one_function() -> None:
    """Known calls in the same time add up; in different times they are two."""
    chains = Chains()
    for run in range(20):
        at = run * GAP
        traced(chains, at, [(1.0, "b"), (1.0, "x"), (1.5, "c")])
        traced(chains, at + 1.0, [(0.5, "c"), (0.5, "c")], caller="b")
        traced(chains, at + 1.0, [(9.0, "c")], caller="x")
    counts = [one.at_once for one in chains.expected("a", 1e4) if one.function == "c"]
    assert counts == [3, 1]


def test_the_window_holds_the_lags_to_come() -> None:
    draw, chains, outside = drawn(3), Chains(), 0
    for run in range(400):
        lag = 2.0 * draw.uniform(0.8, 1.2)
        expected = chains.expected("a", run * GAP)
        if run >= 20:
            one = only(expected)
            outside += not one.begin <= run * GAP + lag <= one.end
            assert one.end - one.begin < 1.5
        traced(chains, run * GAP, [(lag, "b")])
    assert outside < 10


@pytest.mark.parametrize(("took", "count"), [(None, 5), (0.2, 1), (2.5, 3), (60.0, 5)])
def test_how_many_at_once(took: float | None, count: int) -> None:
    """Five calls, one each second: those that run while others do need an instance each."""
    chains = Chains()
    for run in range(5):
        traced(chains, run * GAP, [(lag, "b") for lag in range(1, 6)])
        if took is not None:
            chains.ended("b", took)
    assert only(chains.expected("a", 1e4)).at_once == count
    assert at_once([3, 1, 2], 0.0) == 1 and at_once([1, 1, 1], 0.0) == 3


def test_a_fan_out_that_varies_is_expected_whole() -> None:
    chains = Chains()
    for run, count in zip(range(30), itertools.cycle([1, 4, 2]), strict=False):
        traced(chains, run * GAP, [(1.0, "b")] * count)
    assert only(chains.expected("a", 1e4)).at_once == 4
    for run in range(30, 60):
        traced(chains, run * GAP, [(1.0, "b")] * 2)
    assert only(chains.expected("a", 1e5)).at_once == 2


def test_what_is_called_in_some_runs() -> None:
    chains = Chains()
    for run in range(30):
        traced(chains, run * GAP, [(1.0, "half")] * (run % 2) + [(1.0, "seldom")] * (run == 12))
    assert [one.function for one in chains.expected("a", 1e4)] == ["half"]
    (half,) = [edge for edge in chains.edges("half") if edge.callee == "half"]
    assert half.share == 0.5 and 0.3 < half.sure < 0.5
    assert not chains.edges("seldom"), "one in 17 runs is none"


def test_an_edge_decays_with_runs_and_with_age() -> None:
    chains, now = taught()
    assert only(chains.expected("a", now + 13 * 86400)).function == "b"
    assert chains.expected("a", now + 15 * 86400) == ()
    sure = []
    for run in range(REMEMBERED + 2):
        traced(chains, now + run * GAP, [])
        sure += [edge.sure for edge in chains.edges()]
    assert sure == sorted(sure, reverse=True) and chains.edges() == []


def test_runs_that_are_not_followed_are_not_counted() -> None:
    """Many at once: those beyond the bound are neither hits nor misses."""
    chains = Chains(Bounds(runs=4))
    for burst in range(10):
        for number in range(50):
            at = burst * GAP + number * 0.01
            traced(chains, at, [(1.0, "b")])
    assert chains.edges()[0].share == 1.0
    assert len(chains._functions["a"].runs) == 4


def test_edges_are_bounded() -> None:
    chains = Chains(Bounds(functions=100, edges=50, callees=8))
    for run in range(5):
        traced(chains, run * GAP, [(1.0, "steady")])
    for run in range(5, 200):
        traced(chains, run * GAP, [(1.0, "steady"), (1.0, f"other-{run}")])
        traced(chains, run * GAP, [(1.0, "popular")], caller=f"caller-{run}")
    assert len(chains._functions) <= 100 and len(chains.edges()) <= 50
    assert len([edge for edge in chains.edges() if edge.caller == "a"]) <= 8
    assert len([edge for edge in chains.edges() if edge.callee == "popular"]) <= 8
    assert ("a", "steady") in pairs(chains), "what is sure stays"


def test_a_thousand_functions_invoked_once() -> None:
    chains = Chains(Bounds(functions=64))
    for run in range(5):
        traced(chains, run * GAP, [(1.0, "b")])
    played(((10 * GAP + n * 0.5, f"once-{n}") for n in range(1000)), chains)
    assert len(chains._functions) == 64
    assert only(chains.expected("a", 20 * GAP)).function == "b", "what has edges stays longest"


# --- by timing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0.05, 0.4, 5.0])
def test_timing_alone(lag: float) -> None:
    """Within 20 runs, among others; the reason says that it is no more than timing."""
    draw = drawn(7)
    starts = [(run * GAP, "a") for run in range(21)]
    starts += [(at + lag * draw.uniform(0.85, 1.15), "b") for at, _ in starts[:20] for _ in "123"]
    for number in range(8):
        starts += poisson(draw, f"noise-{number}", 1 / 40, 20 * GAP)
    chains = played(starts)
    assert pairs(chains) == {("a", "b")}
    expected = only(chains.expected("a", 1e4))
    assert (expected.at_once, expected.traced) == (3, False)
    assert expected.begin < 1e4 + lag * 0.9 and 1e4 + lag * 1.1 < expected.end
    assert expected.reason.startswith("it follows a after ")


def test_a_chain_by_timing_counts_no_call_twice() -> None:
    """C follows B, and with B it follows A: that is one C."""
    starts = []
    for run in range(40):
        at = run * GAP
        starts += [(at, "a"), (at + 1.0, "b"), (at + 1.4, "c"), (at + 1.4001, "c")]
    chains = played(starts)
    assert {("a", "b"), ("b", "c"), ("a", "c")} <= pairs(chains)
    assert {one.function: one.at_once for one in chains.expected("a", 1e5)} == {"b": 1, "c": 2}


@pytest.mark.parametrize(
    "rates", [(5.0, 3.0), (0.5, 0.5), (1 / 300, 2.0), (2.0, 1 / 300), (0.05, 0.08), (0.08, 0.05)]
)
def test_unrelated_functions_stay_so(rates: tuple[float, float]) -> None:
    for seed in range(3):
        draw = drawn(seed)
        end = min(4000 / max(rates), 40_000.0)
        starts = [
            s for n, rate in zip("ab", rates, strict=True) for s in poisson(draw, n, rate, end)
        ]
        assert not pairs(played(starts))


def test_unrelated_bursts_stay_so() -> None:
    """Starts that come in heaps are no more evidence than one."""
    for seed in range(3):
        draw, starts = drawn(seed), []
        for name in "abc":
            for at, _ in poisson(draw, name, 1 / 60, 30_000):
                starts += [(at + draw.uniform(0, 3), name) for _ in range(draw.randint(1, 12))]
        assert not pairs(played(starts))


def test_timers_in_phase_do_follow_each_other() -> None:
    """Nothing tells them from a call, and it does no harm: as long as it holds, it is right."""
    starts = [(run * 300.0, "a") for run in range(30)] + [
        (run * 300.0 + 2, "b") for run in range(30)
    ]
    chains = played(starts)
    assert only(chains.expected("a", 1e4)).reason == "it follows a after 2.0 s"
    # One is set to another time: what has followed does so no more.
    later = [(9000 + run * 300.0, "a") for run in range(30)]
    later += [(9100 + run * 300.0, "b") for run in range(30)]
    assert not pairs(played(later, chains))


def test_timers_whose_periods_differ_drift_apart() -> None:
    starts = [(run * 300.0, "a") for run in range(300)] + [(run * 301.0, "b") for run in range(299)]
    assert not pairs(played(starts))


def test_an_edge_that_chance_explains_goes() -> None:
    """B is called by others more and more often: that it is there after A says nothing."""
    draw = drawn(1)
    starts = [(run * GAP, "a") for run in range(60)]
    starts += [(at + 4.0, "b") for at, _ in starts[:30]]
    chains = played(starts[:30] + starts[60:])
    assert pairs(chains) == {("a", "b")}
    rest = [*starts[30:60], *((30 * GAP + at, "b") for at, _ in poisson(draw, "b", 0.3, 30 * GAP))]
    assert not pairs(played(rest, chains))


def test_who_is_known_is_not_guessed() -> None:
    """A request that names its caller is not laid to what began just before."""
    chains = Chains()
    for run in range(40):
        at = run * GAP
        chains.arrived("x", at - 0.5)
        chains.began("x", at - 0.5)
        traced(chains, at, [(1.0, "b")])
    assert ("a", "b") in pairs(chains) and ("x", "b") not in pairs(chains)


def test_recent_names_are_bounded() -> None:
    recent = Recent(10.0)
    for number in range(10_000):
        recent.add(f"f-{number}", number)
    assert recent.names(9999.5) == [f"f-{number}" for number in range(9990, 10_000)]
    assert len(recent._names) < 3000
    recent.add("g", -5.0)
    assert recent.names(-4.0) == ["g"] and recent.names(1e9) == []


def test_a_cause_among_many() -> None:
    """Forty functions begin within the reach of each arrival: the one that counts is found."""
    draw = drawn(4)
    starts = [(run * 90.0, "a") for run in range(25)]
    starts += [(at + 2.0, "b") for at, _ in starts]
    for number in range(150):
        starts += poisson(draw, f"noise-{number}", 1 / 60, 25 * 90)
    assert pairs(played(starts)) == {("a", "b")}


def test_suspects_are_bounded() -> None:
    chains = Chains(Bounds(functions=60, suspects=5, all_suspects=40))
    played(poisson(drawn(1), "f-0", 0.05, 2000), chains)
    starts = [s for n in range(80) for s in poisson(drawn(n), f"f-{n}", 1 / 30, 2000)]
    for start in sorted(starts):
        played([start], chains)
        suspects = [len(known.suspects) for known in chains._functions.values()]
        assert sum(suspects) == chains._suspects <= 40 and max(suspects) <= 5
    assert chains._suspects > 0


# --- clocks, and what is kept ---------------------------------------------------------------------


def test_a_clock_that_jumps() -> None:
    chains, now = taught()
    before = chains.edges()[0].share
    for jump in (-1e6, 3e6, -10.0, 1e9, 0.0):
        traced(chains, now + jump, [(1.2, "b")])
        expected = only(chains.expected("a", now + jump))
        assert now + jump < expected.begin < expected.end < now + jump + 2
    assert chains.edges()[0].share == before == 1.0
    # Half of a run before the jump, half of it after.
    for jump in (-1e6, 1e6):
        chains.began("a", now, "torn")
        chains.arrived("b", now + jump, caller="a", run="torn")
    assert chains.edges()[0].last < 2


def test_nothing_raises() -> None:
    draw = drawn(5)
    chains = Chains(Bounds(functions=8, edges=6, callees=3, runs=3, suspects=2))
    agenda, times = Agenda(), [0.0, 1e12, -1e12, math.inf, -math.inf, math.nan]
    for _ in range(5000):
        now = draw.choice(times) if draw.random() < 0.1 else draw.uniform(0, 2000)
        name, other = (f"f-{draw.randint(0, 12)}" for _ in range(2))
        chains.arrived(name, now, caller=draw.choice([None, other]), run=draw.choice([None, 1, 2]))
        chains.began(name, now, draw.choice([None, 1, 2]))
        chains.ended(name, draw.choice([0.1, -1, math.nan, math.inf]))
        agenda.add(name, chains.expected(name, now))
        due(agenda, now)
        if draw.random() < 0.02:
            chains.forget(name)
    assert len(chains._functions) <= 8 and len(chains.edges()) <= 6
    Chains().load(json.loads(json.dumps(chains.save(0.0))), 0.0)


def test_saved_and_loaded() -> None:
    chains, now = taught(calls=[(1.2, "b"), (1.2, "b"), (3.0, "c")])
    plain = json.loads(json.dumps(chains.save(now)))
    again = Chains()
    again.load(plain, 17.0)
    ours, theirs = chains.expected("a", now), again.expected("a", 17.0)
    assert [(e.function, e.at_once, e.sure, e.reason) for e in ours] == [
        (e.function, e.at_once, e.sure, e.reason) for e in theirs
    ]
    assert theirs[0].begin == pytest.approx(17.0 + ours[0].begin - now)
    assert (
        again.expected("a", 17.0 + 15 * 86400) == ()
        and again.save(17.0 + 15 * 86400)["edges"] == []
    )
    traced(again, 20.0, [(1.2, "b")])
    assert len(again.edges()) == 2


def test_broken_saves_are_left_out() -> None:
    good = taught()[0].save(0.0)["edges"][0]
    broken: list[Any] = [
        None,
        [],
        {},
        {**good, "caller": 1},
        {**good, "callee": "x" * 1000},
        {**good, "age": -1},
        {**good, "age": math.nan},
        {**good, "runs": 5},
        {**good, "runs": [[1]]},
        {**good, "runs": [[2.0, 1.0, 1]]},
        {**good, "runs": [[1.0, math.inf, 1]]},
        {**good, "runs": [[1.0, 1.0, 10**9]]},
    ]
    for plain in ({}, {"edges": 1}, {"edges": broken}):
        chains = Chains()
        chains.load(plain, 0.0)
        assert chains.edges() == []
    chains = Chains(Bounds(edges=3))
    chains.load({"edges": [*broken, *({**good, "callee": f"b-{n}"} for n in range(9))]}, 0.0)
    assert len(chains.edges()) == 3


# --- what is due ----------------------------------------------------------------------------------


def expected(
    function: str, begin: float, end: float, count: int = 1, sure: float = 0.9
) -> Expected:
    return Expected(function, count, begin, end, sure, 1.0, (f"{count} of a", function), True)


def test_an_agenda_adds_runs_and_not_ways() -> None:
    agenda = Agenda()
    for _ in range(20):
        agenda.add("a", [expected("c", 1.0, 2.0, 1)])
    agenda.add("b", [expected("c", 0.9, 1.9, 3, sure=0.95)])
    assert agenda.wanted("c", 0.0) is None and agenda.wanted("x", 0.0) is None
    wanted = agenda.wanted("c", 0.5, lead=0.5)
    assert wanted is not None and (wanted.count, wanted.until) == (20, 2.0)
    assert wanted.reason == "3 of a calls it in 1.0 s" and wanted.sure == 0.95
    assert due(agenda, 1.0) == ["c"]
    assert agenda.wanted("c", 2.1) is None and due(agenda, 1.0) == []


def test_an_agenda_is_bounded_and_forgets() -> None:
    agenda = Agenda()
    for number in range(1000):
        agenda.add("a", [expected("b", 0.0, 1.0 + number)])
    wanted = agenda.wanted("b", 0.5)
    assert wanted is not None and (wanted.count, wanted.until) == (256, 1000.0)
    agenda.forget("b")
    agenda.forget("b")
    assert agenda.wanted("b", 0.5) is None


# --- the bench ------------------------------------------------------------------------------------


def test_the_bench() -> None:
    """Few runs of few chains; docs/scaling.md has the figures of a whole one."""
    world = bench.World(chains=4, noise=8)
    figures = bench.run(seed=2, runs=60, world=world)
    without = figures["without"]
    assert without["b"] < 0.2 and without["first"] < 0.2 and without["runs"] < 0.2
    for mode in ("traced", "timing"):
        assert figures[mode]["b"] >= 0.9 and figures[mode]["c"] >= 0.9
        assert figures[mode]["false_edges"] == 0
    again = bench.run(seed=2, runs=60, world=world)
    assert again["traced"]["b"] == figures["traced"]["b"]


def test_the_command() -> None:
    arguments = ["--runs", "30", "--chains", "2", "--noise", "0"]
    table = CliRunner().invoke(bench.chains, arguments)
    assert table.exit_code == 0 and "timing" in table.output
    data = CliRunner().invoke(bench.chains, [*arguments, "-o", "json"])
    assert json.loads(data.output)["runs"] == 30
    assert REACH > 10


def _expected(at_once: int, begin: float) -> Expected:
    return Expected("g", at_once, begin, begin + 5, 0.9, begin, ("f", "g"), True)


def test_what_has_come_is_expected_no_more() -> None:
    """Of each source that which was to come first; a fan-out one by one."""
    agenda = Agenda()
    agenda.arrived("g")
    agenda.add("f", [_expected(2, 1.0), _expected(1, 3.0)])
    agenda.add("h", [_expected(1, 2.0)])
    counts = []
    for _ in range(4):
        wanted = agenda.wanted("g", 0.0, lead=9)
        counts.append(wanted.count if wanted else 0)
        agenda.arrived("g")
    assert counts == [3, 2, 1, 0]
    assert agenda.wanted("g", 0.0, lead=9) is None and agenda.functions() == []
    agenda.arrived("g")
