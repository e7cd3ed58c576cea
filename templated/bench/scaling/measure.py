"""Replays a trace with all contenders over their settings, and makes a report of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from templated.bench.scaling.hybrid import Hybrid, Setting
from templated.bench.scaling.replay import Keeper, Outcome, replay, replay_scaler, total
from templated.bench.scaling.rivals import Clamp, Fixed, Knative, oracle
from templated.bench.scaling.trace import Trace
from templated.scaling import Policy

OURS, FIXED, HYBRID, ORACLE = "templated", "fixed", "hybrid", "oracle"
# The chance below which an instance is not worth its memory, as a price per GiB.
PRICES = (0.4, 0.25, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.018, 0.012, 0.008, 0.005, 0.003, 0.002)
MINUTES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 45, 60)
REFERENCE = 10
"""The fixed keep-alive in minutes whose memory and cold starts others are compared at."""
_TAILS = ((0.05, 0.99), (0.0, 1.0), (0.05, 0.95), (0.05, 0.9), (0.05, 0.75), (0.1, 0.5))
SETTINGS = tuple(Setting(fixed, *tail) for fixed in (1, 2, 5, 10, 20, 60, 240) for tail in _TAILS)
# Budgets of the table, in multiples of what is needed.
_BUDGETS = (1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.2, 2.4)


@dataclass(frozen=True)
class Point:
    """A contender with one setting."""

    setting: str
    outcomes: tuple[Outcome, ...]
    """One for each function; only their sum for the oracle."""

    @property
    def total(self) -> Outcome:
        """Over all functions."""
        return total(self.outcomes)

    def half(self, odd: int) -> Outcome:
        """Over every second function."""
        return total(self.outcomes[odd::2])


Curves = dict[str, list[Point]]


def measure(trace: Trace, by_memory: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """The report: the curve of each contender, a table, and the choice by halves."""
    curves = replay_all(trace, by_memory, tell)
    reference = next(p for p in curves[FIXED] if p.setting == f"{REFERENCE} min")
    return {
        "kind": "scaling",
        "trace": trace.name,
        "functions": len(trace.rows),
        "minutes": trace.minutes,
        "needed": trace.needed,
        "curves": {name: [_as_dict(p) for p in points] for name, points in curves.items()},
        "table": _table(trace, curves, reference.total),
        "reference": _as_dict(reference),
        "chosen": list(_choices(curves[OURS], reference)) if len(trace.rows) > 1 else [],
    }


def replay_all(trace: Trace, by_memory: bool, tell: Callable[[str], None]) -> Curves:
    """The curve of each contender, by the memory that it holds."""
    curves: Curves = {OURS: []}
    for price in PRICES:
        tell(f"{OURS}, price {price:g}")
        outcomes = replay_scaler(trace, Policy(price=price), by_memory=by_memory)
        curves[OURS].append(Point(f"price {price:g}", tuple(outcomes)))
    for name, setting, keeper in _rivals():
        tell(f"{name}, {setting}")
        outcomes = replay(trace.rows, keeper)
        curves.setdefault(name, []).append(Point(setting, tuple(outcomes)))
    curves[ORACLE] = [Point(f"{gap} min", (sums,)) for gap, sums in oracle(trace.rows)]
    return curves


def _rivals() -> Iterator[tuple[str, str, Callable[[], Keeper]]]:
    for minutes in MINUTES:
        yield FIXED, f"{minutes} min", partial(Fixed, minutes)
        yield "knative", f"window of {minutes} min", partial(Knative, minutes)
        yield "clamp", f"{minutes} min and 1", partial(Clamp, minutes)
    for setting in SETTINGS:
        fixed, head, tail = setting
        yield HYBRID, f"{fixed} min, {head:.0%} to {tail:.0%}", partial(Hybrid, setting)


def at(points: Sequence[Point], budget: float) -> int | None:
    """The fewest cold starts with at most so many instance-minutes; None when nothing fits."""
    return min((p.total.cold for p in points if p.total.held <= budget), default=None)


def _table(trace: Trace, curves: Curves, reference: Outcome) -> list[dict[str, Any]]:
    budgets = {round(times * trace.needed) for times in _BUDGETS} | {reference.held}
    return [
        {"budget": budget} | {name: at(points, budget) for name, points in curves.items()}
        for budget in sorted(budgets)
    ]


def _choices(ours: Sequence[Point], reference: Point) -> Iterator[dict[str, Any]]:
    """The setting that does best on one half of the functions, and what it comes to for the other
    half and for all. Best is the least sum of cold starts and memory, each as a share of the
    reference's: a setting that buys one dearly with the other serves nobody."""
    for half in (0, 1):
        than = reference.half(half)
        if than.cold and than.held:
            best = min(ours, key=lambda p: _share(p.half(half), than))
            yield {
                "on": ("first, third, ...", "second, fourth, ...")[half],
                "setting": best.setting,
                "others": _figures(best.half(1 - half)),
                "others_reference": _figures(reference.half(1 - half)),
                "all": _figures(best.total),
            }


def _share(outcome: Outcome, than: Outcome) -> float:
    return outcome.cold / than.cold + outcome.held / than.held


def _as_dict(point: Point) -> dict[str, Any]:
    return {"setting": point.setting, **_figures(point.total)}


def _figures(outcome: Outcome) -> dict[str, Any]:
    figures = {"cold": outcome.cold, "held": outcome.held}
    if not outcome.gib:  # the oracle counts no more
        return figures
    return figures | {
        "gib_minutes": round(outcome.gib, 1),
        "active_warm_percent": round(outcome.warm, 3),
    }
