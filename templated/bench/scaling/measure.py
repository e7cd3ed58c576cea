"""Replays a trace with all contenders over their settings, and makes a report of it."""

from __future__ import annotations

import math
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
# The chances below which an instance is not worth its memory.
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
Held = Callable[[Outcome], float]


def measure(trace: Trace, by_memory: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """The report: the curve of each contender, a table, and the choice by halves."""
    curves = replay_all(trace, by_memory, tell)
    if by_memory:
        del curves[ORACLE]  # it counts instances
    held = _gib if by_memory else _instances
    reference = next(p for p in curves[FIXED] if p.setting == f"{REFERENCE} min")
    return {
        "kind": "scaling",
        "trace": trace.name,
        "functions": len(trace.rows),
        "minutes": trace.minutes,
        "unit": "GiB-minutes" if by_memory else "instance-minutes",
        "needed": round(trace.needed_gib, 1) if by_memory else trace.needed,
        "curves": {
            name: [{"setting": p.setting, **_figures(p.total)} for p in points]
            for name, points in curves.items()
        },
        "table": _table(trace, curves, reference, held),
        "reference": {"setting": reference.setting, **_figures(reference.total)},
        "chosen": list(_choices(curves[OURS], reference, held)) if len(trace.rows) > 1 else [],
    }


def _instances(outcome: Outcome) -> float:
    return outcome.held


def _gib(outcome: Outcome) -> float:
    return outcome.gib


def replay_all(trace: Trace, by_memory: bool, tell: Callable[[str], None]) -> Curves:
    """The curve of each contender."""
    curves: Curves = {OURS: []}
    gib = sum(row.mib for row in trace.rows) / len(trace.rows) / 1024 if by_memory else 1.0
    for chance in PRICES:
        setting = f"price {chance / gib:.3g}"
        tell(f"{OURS}, {setting}")
        outcomes = replay_scaler(trace, Policy(price=chance / gib), by_memory=by_memory)
        curves[OURS].append(Point(setting, tuple(outcomes)))
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


def at(points: Sequence[Point], budget: float, held: Held = _instances) -> int | None:
    """The fewest cold starts with at most so much held; None when nothing fits."""
    return min((p.total.cold for p in points if held(p.total) <= budget), default=None)


def _table(trace: Trace, curves: Curves, reference: Point, held: Held) -> list[dict[str, Any]]:
    needed = trace.needed_gib if held is _gib else trace.needed
    budgets = {round(times * needed) for times in _BUDGETS} | {math.ceil(held(reference.total))}
    return [
        {"budget": budget} | {name: at(points, budget, held) for name, points in curves.items()}
        for budget in sorted(budgets)
    ]


def _choices(ours: Sequence[Point], reference: Point, held: Held) -> Iterator[dict[str, Any]]:
    """The setting that does best on one half of the functions, and what it comes to for the other
    half and for all. Best is the least sum of cold starts and memory, each as a share of the
    reference's: a setting that buys one dearly with the other serves nobody."""
    for half in (0, 1):
        than = reference.half(half)
        if than.cold and than.held:
            best = min(ours, key=lambda p: _share(p.half(half), than, held))
            yield {
                "on": ("first, third, ...", "second, fourth, ...")[half],
                "setting": best.setting,
                "others": _figures(best.half(1 - half)),
                "others_reference": _figures(reference.half(1 - half)),
                "all": _figures(best.total),
            }


def _share(outcome: Outcome, than: Outcome, held: Held) -> float:
    return outcome.cold / than.cold + held(outcome) / held(than)


def _figures(outcome: Outcome) -> dict[str, Any]:
    figures = {"cold": outcome.cold, "held": outcome.held}
    if not outcome.gib:  # the oracle counts no more
        return figures
    return figures | {
        "gib_minutes": round(outcome.gib, 1),
        "active_warm_percent": round(outcome.warm, 3),
    }
